"""The measurement of feature reuse: what it asks a generator for, and what it makes of that."""

from dataclasses import replace
from types import SimpleNamespace

from PIL import Image

from ldm_runtime.specs.networks import UNetSpec
from ldm_runtime.testing import tiny_spec
from models.shapes import evaluate_reuse
from models.shapes.catalog.models import MODELS
from models.shapes.evaluation import tasks

MODEL = MODELS["semantic_synthesis"]


class Painter:
    """A generator that paints what was asked for, one grey level off where features are reused."""

    backend, bundle_sha256 = "fake", "a" * 64

    def __init__(self, prompts):
        spec = tiny_spec("semantic-synthesis")
        unet = replace(spec.network(UNetSpec), shallow_blocks=2)
        self.spec, self.asked = spec.with_networks(unet=unet), []
        self._truths = [prompt.truth for prompt in prompts]

    def __call__(self, *, seed, reuse=None, **fields):
        self.asked.append((seed - tasks.SEED, reuse, fields.get("num_inference_steps")))
        truth = self._truths[seed - tasks.SEED]
        image = truth if reuse is None else truth ^ 1
        return SimpleNamespace(images=[Image.fromarray(image)])


def test_rules_take_turns_and_are_compared_with_none():
    painter = Painter(tasks.held_out_prompts(MODEL, 2, tasks.SEED))
    args = evaluate_reuse.build_parser().parse_args(["--images", "2", "--rules", "deep:2"])

    none, rule = evaluate_reuse.measure(painter, MODEL, args)

    warming, asked = painter.asked[:2], painter.asked[2:]
    assert [reuse for _, reuse, _ in warming] == [None, "deep:2"]
    assert asked == [(0, None, None), (0, "deep:2", None), (1, None, None), (1, "deep:2", None)]
    assert (none.settings["reuse"], rule.settings["reuse"]) == ("none", "deep:2")
    assert none.settings["shallow_blocks"] == 2
    assert none.scores["whole_images"] == rule.scores["whole_images"] == 1
    assert (none.metrics["squared_error"], rule.metrics["squared_error"]) == ((0, 2), (2, 2))
    assert len(rule.seconds) == 2


def test_a_run_that_was_stopped_goes_on_with_the_next_prompts():
    painter = Painter(tasks.held_out_prompts(MODEL, 43, tasks.SEED))
    args = evaluate_reuse.build_parser().parse_args(
        ["--images", "23", "--first", "20", "--rules", "deep:2"]
    )

    rows = [*evaluate_reuse.measure(painter, MODEL, args)]

    assert [(row.settings["first"], row.settings["images"]) for row in rows] == [
        *[(20, 20)] * 2,
        *[(40, 3)] * 2,
    ]
    assert {index for index, *_ in painter.asked[2:]} == {*range(20, 43)}


def test_the_report_has_all_prompts_of_each_rule_and_how_much_faster_it_is():
    painter = Painter(tasks.held_out_prompts(MODEL, 2, tasks.SEED))
    args = evaluate_reuse.build_parser().parse_args(["--images", "2", "--rules", "deep:2"])
    none, rule = evaluate_reuse.measure(painter, MODEL, args)
    later = [replace(row, settings={**row.settings, "first": 20}) for row in (none, rule)]
    rows = [
        *(replace(none, seconds=(9.0,)), replace(rule, seconds=(9.0,))),  # measured again
        *(replace(none, seconds=(3.0, 5.0)), replace(rule, seconds=(1.0, 3.0))),
        *(replace(later[0], seconds=(4.0, 4.0)), replace(later[1], seconds=(1.0, 3.0))),
    ]

    *_, without, with_rule = evaluate_reuse.report(rows).split("\n")

    assert without.endswith("| 4 | 2 | none | 100.0% |  | 4.000 s | 1.00× |")
    assert with_rule.endswith("| 4 | 2 | `deep:2` | 100.0% | 48.1 dB | 2.000 s | 2.00× |")
