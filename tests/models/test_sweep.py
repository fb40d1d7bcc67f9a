import contextlib
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ldm_runtime import Generator
from ldm_runtime.conditioning import Conditioning
from ldm_runtime.errors import LdmError, RequestError
from ldm_runtime.pipeline.sampling import sample_latents
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import timestep_of, training_sigmas
from ldm_runtime.testing import TINY_SPEC, FakeEngine, write_tiny_bundle
from models.shapes import evaluate, sweep
from models.shapes.evaluation import (
    cells,
    charts,
    held_out,
    prompts,
    quality,
    quality_page,
    quality_report,
    scoring,
    sweep_runs,
)

TALLY = scoring.Tally(
    images=50,
    images_right=25,
    objects=100,
    objects_right=90,
    relations=40,
    relations_right=20,
)


def cell(sampler="ddim", steps=8, **changes):
    settings = {"sampler": sampler, "num_inference_steps": steps}
    settings |= {"captions": 50, "layouts": 8, "guidance_scale": 7.5}
    fields = {
        "name": "shapes_sweep",
        "backend": "onnxruntime",
        "commit": "c0ffee",
        "bundle_sha256": "ab" * 32,
        "device": "a machine",
        "settings": settings,
        "seconds": (0.5, 0.7, 0.6),
        "calls": steps,
        "counts": TALLY,
        "distance": 0.5,
        "floor": 0.01,
    }
    return cells.Cell(**(fields | changes))


def scored(**counts):
    return {"counts": replace(TALLY, **counts)}


@pytest.fixture
def bundle(tmp_path):
    """The tiny bundle at the size of the shapes' images."""
    write_tiny_bundle(tmp_path / "engines")
    return tmp_path / "engines"


def run(bundle, *arguments):
    """Sweep two captions and return the exit status and the rows of the results file."""
    results = bundle.parent / "results.jsonl"
    status = evaluate.main(
        ["--sweep", f"--bundle={bundle}", f"--results={results}", "--captions=2", *arguments]
    )
    lines = results.read_text().splitlines() if results.exists() else []
    return status, [json.loads(line) for line in lines]


def test_a_sweep_writes_a_row_for_every_sampler_and_number_of_steps(bundle):
    status, rows = run(bundle, "--samplers", "ddim", "heun", "--steps", "1", "3")

    assert status == 0
    cells = [(r["settings"]["sampler"], r["settings"]["num_inference_steps"]) for r in rows]
    assert cells == [("ddim", 1), ("ddim", 3), ("heun", 1), ("heun", 3)]
    assert [row["calls"] for row in rows] == [1, 3, 1, 5]


def test_a_row_holds_what_it_takes_to_score_and_repeat_it(bundle):
    _, (row,) = run(bundle, "--samplers", "euler_ancestral", "--steps", "2")

    assert row["counts"]["images"] == 2
    assert row["distance"] > 10 * row["floor"]  # the tiny bundle has learnt nothing
    assert len(row["seconds"]) == 2
    assert row["settings"]["eta"] == 1.0
    assert row["settings"]["guidance_scale"] == TINY_SPEC.defaults.guidance_scale
    assert row["settings"]["schedule"] == SAMPLERS["euler_ancestral"].schedule
    assert row["settings"]["seed"] == held_out.SEED
    assert len(row["bundle_sha256"]) == 64


def test_a_row_read_back_is_the_cell_that_was_written(tmp_path):
    written = cell(distance=0.25)

    cells.append_cell(tmp_path / "new" / "results.jsonl", written)

    assert cells.read_cells(tmp_path / "new" / "results.jsonl") == [written]


def test_the_same_sweep_again_measures_only_what_is_not_there(bundle, capsys):
    _, first = run(bundle, "--samplers", "ddim", "--steps", "1")

    _, rows = run(bundle, "--samplers", "ddim", "--steps", "1", "2")

    assert rows[0] == first[0]
    assert [row["settings"]["num_inference_steps"] for row in rows] == [1, 2]
    assert "1 of 2 cells are there" in capsys.readouterr().err


def test_other_captions_or_another_bundle_are_measured_again(bundle):
    run(bundle, "--samplers", "ddim", "--steps", "1")
    run(bundle, "--samplers", "ddim", "--steps", "1", "--captions", "3")
    manifest = bundle / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")

    _, rows = run(bundle, "--samplers", "ddim", "--steps", "1")

    assert [row["settings"]["captions"] for row in rows] == [2, 3, 2]
    assert rows[0]["bundle_sha256"] != rows[2]["bundle_sha256"]


def test_every_cell_gets_the_same_captions_and_noise(bundle):
    _, (ddim, euler) = run(bundle, "--samplers", "euler", "dpmpp_2m", "--steps", "1")

    # One step to zero is the same for both, so the images are, and all that is read in them.
    assert ddim["counts"] == euler["counts"]
    assert ddim["distance"] == euler["distance"]


class StopsAtTheFirstCell(io.StringIO):
    """A terminal at which the user presses Ctrl-C when the first cell is done."""

    def write(self, text):
        if "min left" in text and "min left" not in self.getvalue():
            super().write(text)
            raise KeyboardInterrupt
        return super().write(text)


def test_a_sweep_that_is_stopped_keeps_its_cells_and_goes_on_when_called_again(bundle):
    with contextlib.redirect_stderr(StopsAtTheFirstCell()) as terminal:
        stopped, kept = run(bundle, "--samplers", "ddim", "--steps", "1", "2")

    status, rows = run(bundle, "--samplers", "ddim", "--steps", "1", "2")

    assert (stopped, len(kept), status, len(rows)) == (130, 1, 0, 2)
    assert rows[0] == kept[0]
    assert "keeps the cells that are done" in terminal.getvalue()


def test_a_line_that_is_no_cell_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"name": "half a li')

    with pytest.raises(LdmError, match=r"results\.jsonl:1 is no cell .*remove it"):
        cells.read_cells(path)


def test_an_unknown_sampler_is_an_error_with_the_choices(bundle, capsys):
    status, rows = run(bundle, "--samplers", "magic")

    assert (status, rows) == (1, [])
    assert "magic" in (said := capsys.readouterr().err)
    assert "ddim" in said


@pytest.mark.parametrize("captions", ["1", "many"])
def test_fewer_than_two_captions_are_bad_usage(captions, capsys):
    with pytest.raises(SystemExit) as stop:
        sweep.main(["--sweep", "--captions", captions])

    assert stop.value.code == 2
    assert repr(captions) in capsys.readouterr().err


def test_the_whole_grid_has_every_sampler_and_leaves_out_what_takes_too_many_calls():
    grid = sweep_runs.plan(TINY_SPEC, (), ())

    assert {request.sampler for request in grid} == set(SAMPLERS)
    cells = {(request.sampler, request.num_inference_steps) for request in grid}
    assert ("ddim", 50) in cells
    assert ("heun", 25) in cells
    assert ("heun", 50) not in cells


def test_steps_that_are_asked_for_are_run_whatever_they_cost():
    (request,) = sweep_runs.plan(TINY_SPEC, ("heun",), (50,))

    assert sweep_runs.count_calls(request) == 99


def test_a_plan_names_an_unknown_sampler():
    with pytest.raises(RequestError, match="magic"):
        sweep_runs.plan(TINY_SPEC, ("magic",), ())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_calls_counted_are_those_the_network_gets(sampler):
    (request,) = sweep_runs.plan(TINY_SPEC, (sampler,), (5,))
    network = FakeEngine(lambda inputs: {"prediction": 0.1 * inputs["latents"]})
    context = np.zeros((2, 16, 8), np.float32)

    for _ in sample_latents(network, Conditioning(context=context), request, TINY_SPEC):
        pass

    assert sweep_runs.count_calls(request) == len(network.calls)


def test_right_images_are_as_near_as_the_floor_says():
    prompt_set = prompts.prepare_prompts(8)

    assert (
        prompts.distance_from(prompt_set.reference, prompts.renders(prompt_set.wanted))
        == prompt_set.floor
    )
    blank = np.full_like(prompts.renders(prompt_set.wanted), 128)
    assert prompts.distance_from(prompt_set.reference, blank) > 20 * prompt_set.floor


def test_progress_says_what_was_found_and_how_long_the_rest_takes():
    line = sweep.progress(cell("heun", 8, calls=15, seconds=(0.5,) * 60), calls_left=60)

    assert line.startswith("heun, 8 steps, 15 calls: objects 90%, whole images 50%")
    assert line.endswith("about 2 min left")


def test_the_plateau_is_every_sampler_with_its_most_steps():
    few, many = cell("ddim", 8), cell("ddim", 50)
    other = cell("euler", 25)

    assert quality.plateau([many, few, other, cell("lcm", 50)]) == [many, other]


def test_as_good_is_one_point_and_one_standard_error_below_the_median_of_the_plateau():
    shares = {"ddim": 90, "euler": 100, "heun": 10}
    cells = [cell(name, 50, **scored(objects_right=right)) for name, right in shares.items()]

    assert quality.lowest_as_good(cells, "objects") == pytest.approx(0.9 - 0.01 - 0.03)


def test_the_fewest_calls_as_good_as_many_steps_come_first():
    many = cell("ddim", 50)
    few = cell("ddim", 8, calls=15, **scored(objects_right=87))
    fewer = cell("ddim", 12, **scored(objects_right=87))
    poor = cell("ddim", 4, **scored(objects_right=85))

    assert quality.as_good_as_many_steps([many, few, fewer, poor]) == [fewer, few, many]


@pytest.mark.parametrize("count", ["objects_right", "relations_right", "images_right"])
def test_as_good_means_in_every_measure(count):
    many, few = cell("ddim", 50), cell("ddim", 4, **scored(**{count: 0}))

    assert quality.as_good_as_many_steps([many, few]) == [many]


def test_images_much_farther_from_right_ones_are_not_as_good():
    many, near, far = cell("ddim", 50), cell("ddim", 8, distance=0.62), cell(distance=0.63)

    assert quality.as_good_as_many_steps([many, near, far]) == [near, many]


def test_of_as_many_calls_the_images_nearest_to_right_ones_win():
    far, near = cell("ddim", 8, distance=0.3), cell("euler", 8, distance=0.28)

    assert quality.as_good_as_many_steps([far, near]) == [near, far]


def test_of_as_many_calls_the_most_whole_images_win_before_the_distance():
    near = cell("ddpm", 8, distance=0.28, **scored(images_right=48))
    right = cell("euler", 8, distance=0.3, **scored(images_right=50))

    assert quality.as_good_as_many_steps([near, right])[0] is right


def test_a_lucky_cell_does_not_raise_the_standard():
    lucky = cell("euler", 12, **scored(objects_right=99))
    usual = [cell(name, 50) for name in ("ddim", "heun", "euler")]

    assert quality.as_good_as_many_steps([lucky, *usual]) == [lucky, *usual]


def test_samplers_for_other_models_are_neither_chosen_nor_the_standard():
    perfect = cell("lcm", 4, **scored(objects_right=100, images_right=50, relations_right=40))
    many = cell("ddim", 50)

    assert quality.as_good_as_many_steps([perfect, many]) == [many]
    assert "`lcm (other models)`" in quality_page.page([perfect, many])


def test_a_report_shows_the_bundle_and_the_captions_of_the_last_row_only():
    old = cell("euler", bundle_sha256="cd" * 32)
    first, again = cell(distance=0.5), cell(distance=0.4)

    assert quality.latest_cells([old, first, again]) == [again]


def test_the_page_names_the_choice_and_shows_every_cell():
    cells = [
        cell("ddim", 50, distance=0.511),
        cell("dpmpp_2m", 12, distance=0.522),
        cell("euler", 12, distance=0.577, **scored(objects_right=50)),
    ]

    text = quality_page.page(cells)

    assert "**`dpmpp_2m` with 12 steps** (12 calls)" in text
    assert "With no number of steps measured: `euler`." in text
    assert all(f"{each.distance:.3g}" in text for each in cells)
    assert "| `euler` | 50.0 % |  |" in text  # no cell with 50 steps
    assert "from 86.0 % of objects" in " ".join(text.split())
    assert "FID" not in text


def test_if_nothing_is_as_good_the_page_says_so():
    cells = [
        cell("ddim", 50, **scored(relations_right=0)),
        cell("euler", 50, **scored(objects_right=0)),
        cell("heun", 50, **scored(images_right=0)),
    ]

    assert "No cell is as good as many steps" in quality_page.page(cells)


def test_the_report_is_a_page_and_an_image(tmp_path, capsys):
    for each in (cell("ddim", 8), cell("ddim", 50, distance=0.1), cell("lcm", 8)):
        cells.append_cell(tmp_path / "results.jsonl", each)

    status = evaluate.main(
        ["--report", "--results", str(tmp_path / "results.jsonl"), "--docs", str(tmp_path / "docs")]
    )

    assert status == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "docs" / "quality.md")
    assert (tmp_path / "docs" / "quality.png").stat().st_size > 5000


def test_nothing_to_report_is_an_error_that_says_what_to_run(tmp_path, capsys):
    status = evaluate.main(["--report", "--results", str(tmp_path / "none.jsonl")])

    assert status == 1
    assert "--sweep first" in capsys.readouterr().err


def test_up_to_twenty_samplers_have_lines_unlike_each_other():
    lines = quality_report._lines([cell(f"sampler {index}") for index in range(20)], lambda _: 1.0)

    assert len({(line.color, line.mark) for line in lines}) == 20


def test_a_logarithmic_axis_runs_from_one_round_number_to_another():
    axis = charts.logarithmic_axis("calls", [3, 47])

    assert axis.ticks == (3, 5, 10, 20, 30, 50)
    assert axis.place(12.247) == pytest.approx(0.5, abs=1e-4)


def test_a_round_number_is_its_own_tick():
    assert charts.logarithmic_axis("", [0.001, 0.02]).ticks[0] == pytest.approx(0.001)
    assert charts.logarithmic_axis("", [0.01, 0.01]).ticks == pytest.approx((0.01, 0.02))


def test_a_point_is_plotted_where_its_values_say():
    axis = charts.Axis(label="", ticks=(0.0, 10.0))
    dot = charts.Series(label="", points=[(10.0, 0.0)], color="#ff0000", mark="square")

    image = charts.draw_chart("", axis, axis, [dot])

    red = np.argwhere((np.asarray(image) == (255, 0, 0)).all(axis=2))
    bottom_right = (300 - 50, 440 - 24)
    assert abs(red.mean(axis=0) - bottom_right).max() < 1.5


def test_charts_in_a_grid_keep_reading_order():
    colors = ["#ff0000", "#00ff00", "#0000ff"]
    images = [Image.new("RGB", (4, 4), color) for color in colors]

    sheet = charts.grid(images, columns=2)

    assert [sheet.getpixel(place) for place in [(0, 0), (4, 0), (0, 4)]] == [
        (255, 0, 0), (0, 255, 0), (0, 0, 255),
    ]  # fmt: skip


# Planted faults of the loop, seen in the trained model's images alone. Smaller ones change too
# little for that: a timestep that is off by one moves an image by a twentieth of a grey level. The
# tests of the denoiser and the samplers, which compare numbers, are what notices those.


class FaultyNetwork:
    """A network whose inputs go through `fault` first."""

    def __init__(self, network, fault):
        self._network, self._fault = network, fault

    def run(self, inputs):
        return self._network.run(self._fault(dict(inputs)))


def swapped_guidance(inputs):
    return inputs | {"context": np.roll(inputs["context"], 1, axis=0)}


def higher_sigma(inputs):
    """The input of a denoiser that takes sigma for six times its value."""
    sigmas = training_sigmas(TINY_SPEC.alphas_cumprod)  # Stable Diffusion's, as the model's are
    sigma = float(np.interp(inputs["timesteps"][0], np.arange(len(sigmas)), sigmas))
    wrong = 6 * sigma  # noise in every step mends what three times does
    scale = np.float32(math.hypot(1, sigma) / math.hypot(1, wrong))
    timesteps = np.full_like(inputs["timesteps"], timestep_of(wrong, sigmas))
    return inputs | {"latents": scale * inputs["latents"], "timesteps": timesteps}


@pytest.mark.slow
def test_images_show_swapped_guidance_and_a_wrong_sigma(shapes_bundle):
    prompt_set = prompts.prepare_prompts(8)
    counts, distances = {}, {}

    for fault in (dict, swapped_guidance, higher_sigma):
        with Generator(shapes_bundle, backend="onnxruntime") as generator:
            networks = generator._network._opened
            networks["unet"] = FaultyNetwork(networks["unet"], fault)
            images, _ = held_out.generate_all(
                generator, prompt_set.wanted, {"num_inference_steps": 10}
            )
        counts[fault] = scoring.score_all(prompt_set.wanted, images)
        distances[fault] = prompts.distance_from(prompt_set.reference, np.stack(images))

    assert counts[dict].objects_right >= 0.8 * counts[dict].objects
    assert counts[swapped_guidance].objects_right == 0
    assert distances[swapped_guidance] > 10 * distances[dict]
    assert distances[higher_sigma] > 1.5 * distances[dict]
