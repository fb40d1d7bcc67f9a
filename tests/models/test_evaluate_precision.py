"""The measurement of precisions: what they are compared with, and what the table says of them."""

from types import SimpleNamespace

from PIL import Image

from ldm_runtime.testing import tiny_spec
from models.shapes import evaluate_precision
from models.shapes.catalog.models import MODELS
from models.shapes.evaluation import paired, tasks

MODEL = MODELS["semantic_synthesis"]


class Painter:
    """A generator that paints what was asked for, one grey level off in bf16 and two in int8."""

    backend, bundle_sha256 = "fake", "a" * 64

    def __init__(self, precision, asked):
        self.spec, self._off, self._asked = tiny_spec("semantic-synthesis"), precision, asked
        prompts = tasks.held_out_prompts(MODEL, 2, tasks.SEED)
        self._truths = [prompt.truth for prompt in prompts]

    def __call__(self, *, seed, **fields):
        self._asked.append((self._off, seed - tasks.SEED, fields.get("num_inference_steps")))
        off = {"fp32": 0, "bf16": 1, "int8": 2}[self._off]
        return SimpleNamespace(images=[Image.fromarray(self._truths[seed - tasks.SEED] ^ off)])


def test_precisions_take_turns_and_are_compared_with_fp32():
    asked = []
    ways = [
        paired.Way(generator=Painter(each, asked), fields={}, settings={"precision": each})
        for each in ("fp32", "bf16", "int8")
    ]

    rows = [*paired.measure(MODEL, ways, 0, 2)]

    assert asked[:3] == [("fp32", 0, 2), ("bf16", 0, 2), ("int8", 0, 2)]  # opened
    assert [each[:2] for each in asked[3:6]] == [("fp32", 0), ("bf16", 0), ("int8", 0)]
    assert [row.metrics["squared_error"] for row in rows] == [(0, 2), (2, 2), (8, 2)]
    *_, exact, bf16, int8 = evaluate_precision.report(rows).split("\n")
    assert "| fp32 | 2 | 100.0% |  |" in exact
    assert "| bf16 | 2 | 100.0% | 48.1 dB |" in bf16
    assert "| int8 | 2 | 100.0% | 42.1 dB |" in int8
