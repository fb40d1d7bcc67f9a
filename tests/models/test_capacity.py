"""The capacity model: its queues against SciPy and a simulation, its tables against the page."""

import heapq
import random
from pathlib import Path

import pytest
from scipy.stats import poisson
from torch.utils.flop_counter import FlopCounterMode

from measuring.rows import read_records
from scripts.capacity import (
    Assumptions,
    erlang_c,
    fleet,
    image_work,
    main,
    measured,
    tables,
    waits,
)

PAGE = Path(__file__).parents[2] / "docs/deployment.md"


@pytest.mark.parametrize("places", [1, 4, 32, 4000])
@pytest.mark.parametrize("load", [0.3, 0.85, 0.99])
def test_the_probability_of_a_wait_is_erlang_s(places, load):
    """C follows from B, which is the last term of a Poisson distribution cut off at c."""
    blocked = poisson.pmf(places, places * load) / poisson.cdf(places, places * load)

    assert erlang_c(places, load) == pytest.approx(blocked / (1 - load * (1 - blocked)), rel=1e-9)


def simulated_waits(places, load, draw, arrivals=200_000, seed=1):
    """Return mean and 95th percentile of the wait of a first-come queue, by its events."""
    rng, now, free = random.Random(seed), 0.0, [0.0] * places
    found = []
    for _ in range(arrivals):
        now += rng.expovariate(places * load)
        start = max(now, heapq.heappop(free))
        heapq.heappush(free, start + draw(rng))
        found.append(start - now)
    found.sort()
    return sum(found) / arrivals, found[int(0.95 * arrivals)]


@pytest.mark.parametrize(
    ("variation", "draw", "tolerance"),
    [
        (1.0, lambda rng: rng.expovariate(1.0), 0.1),  # M/M/c, where the formula is exact
        (0.29, lambda rng: rng.uniform(0.5, 1.5), 0.2),
    ],
)
def test_waits_are_those_of_a_simulation(variation, draw, tolerance):
    mean, p95 = waits(4, 0.85, 1.0, variation)

    simulated_mean, simulated_p95 = simulated_waits(4, 0.85, draw)

    assert mean == pytest.approx(simulated_mean, rel=tolerance)
    assert p95 == pytest.approx(simulated_p95, rel=tolerance)


def test_no_one_waits_where_places_are_many():
    assert waits(4000, 0.5, 1.0, 1.0) == (pytest.approx(0.0, abs=1e-12), 0.0)


@pytest.mark.reference
@pytest.mark.slow
def test_the_operations_of_an_image_are_those_that_torch_counts():
    """Of the UNet, which does nearly all: that of diffusers, as Stable Diffusion 1.5 has it."""
    import torch
    from diffusers import UNet2DConditionModel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8
        ).eval()
        latents, context = torch.zeros(2, 4, 64, 64), torch.zeros(2, 77, 768)
        steps = torch.zeros(2)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        unet(latents, steps, context)

    one, two = (image_work(Assumptions(steps=steps)).flops for steps in (1, 2))
    assert two - one == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_what_was_measured_is_in_the_rows():
    known = measured()

    latency = read_records(PAGE.parents[1] / "benchmarks/results/latency.jsonl")[-1]
    (row,) = (
        row
        for row in latency["rows"]
        if row["name"] == "unet" and row["settings"]["state"] == "steady"
    )
    reached = latency["work"]["unet"]["flops"] / row["median_seconds"]
    assert known.efficiency == pytest.approx(reached / latency["ceilings"]["matmul_flops"])
    assert 0 < known.efficiency < 1


def test_the_page_has_the_tables_that_the_script_prints(capsys):
    assert main([]) == 0

    printed = capsys.readouterr().out
    assert printed == tables(Assumptions(), measured()) + "\n"
    assert printed in PAGE.read_text(encoding="utf-8"), "run `python -m scripts.capacity`"


def test_other_numbers_give_other_answers(capsys):
    known = measured()
    usual, double = (fleet(Assumptions(gpus=count), known) for count in (1000, 2000))

    assert double.images_per_second == pytest.approx(2 * usual.images_per_second)
    assert double.failures_per_day == pytest.approx(2 * usual.failures_per_day)
    assert main(["--gpus", "64", "--max-batch", "1", "--price", "1"]) == 0
    alone = fleet(Assumptions(gpus=64, max_batch=1), known)
    assert alone.full_seconds == pytest.approx(alone.alone_seconds)
    assert "wait behind 64 GPUs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "0"], "must be a whole number above 0, got '0'"),
        (["--price", "nan"], "must be a number above 0, got 'nan'"),
        (["--size", "500"], "--size: must be a multiple of 64, got 500"),
        (["--fixed-share", "1"], "--fixed-share: must be below 1, got 1"),
    ],
)
def test_a_wrong_number_gets_one_sentence(flags, message, capsys):
    with pytest.raises(SystemExit):
        main(flags)

    assert message in capsys.readouterr().err
