"""Write docs/trained-models.md from measured rows: `python -m scripts.trained_page`.

The rows are the last ones that `models/shapes/evaluate.py --results` and `evaluate_tasks.py` wrote
for each model and kind of caption, and those of `models/shapes/evaluate_precision.py`.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measuring.rows import read_records
from models.shapes import evaluate_precision
from models.shapes.catalog.models import MODELS
from models.shapes.catalog.variants import VARIANTS
from models.shapes.evaluation.intervals import share_text
from models.shapes.evaluation.scores import WHOLE
from models.shapes.evaluation.tasks import RESULTS, TaskRow, read_rows
from scripts.pages import write_page

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/trained-models.md"
SHAPES_ROWS = ROOT / "benchmarks/results/shapes_evaluate.jsonl"

_INTRODUCTION = """\
# The trained models that come along

<!-- Written by `python -m scripts.trained_page`; change that script, not this page. -->

`models/shapes/` has a small trained model for every task of the paper but retrieval. Each generates
64×64 images of coloured shapes. Their data and training are in
[their card](../models/shapes/README.md), their sheets in [tasks.md](tasks.md).

One measure holds for all of them: **the whole image is right, nothing is missing and nothing is
extra**. A detector that learns nothing (`models/shapes/evaluation/detector.py`) reads each image
back. It must find exactly what was asked for, each shape must clearly be of its kind, no other
coloured pixels may be left, and the background must be even. Prompts and scenes are held out from
training. Shares come with their 95 % interval (Wilson).

| model | generated from | whole images | prompts |
|---|---|---|---|
"""

_PRECISIONS = """
## What lower precision costs

The same held-out prompts and noise in every precision, in turns on one machine ({device}):
fp32, bf16, and [8 bits](deployment.md#eight-bits) as `ldm quantize` made them, where everything but
the UNet computes in bf16. PSNR is that of all images to those in fp32, of which a few that turn out
otherwise decide. Images of 64×64 pixels are small, so that speed says little of larger ones.
Measured by `models/shapes/evaluate_precision.py`.

"""

_FROM: Mapping[str, str] = {
    "unconditional": "nothing",
    "class_to_image": "one of 24 classes",
    "text_to_image_bert": "a full caption (BERT)",
    "layout_to_image": "boxes with labels",
    "semantic_synthesis": "a segmentation map",
    "super_resolution": "a 16×16 image",
    "inpainting": "an image with a masked region of 5 to 50 %",
}
_SHORT = "a short caption, such as “a red circle”"
_CAPTION: Mapping[str, str] = {
    "shapes_inpainting": "a full caption (CLIP) and an image with a masked region of 5 to 50 %",
}
_AS_NOISE = "for comparison: the same file read as predicting noise (`--prediction-type epsilon`)"
_SCHEDULE_CUT = "for comparison: the same file without its mark `ztsnr`"
_HOLES = "for comparison: the masked region filled with the mean colour, without a model"
_SCORES: Mapping[str, str] = {
    "class": "exactly one object, of the right kind and colour",
    "objects": "objects of the right kind and colour",
    "relations": "relations that hold",
    "overlap": "overlap of found objects with their boxes",
    "labels": "labels found",
    "pixels": "pixels of the re-read image with the right class",
    "thing_pixels": "the same on objects",
    "psnr": "PSNR in dB",
    "plain_psnr": "PSNR in dB of bicubic interpolation, or of the mean colour",
    "kept": "images whose known pixels are exact",
    "readable": "images with everything that shows by half or more",
}
_NEARLY_ZERO = 1e-6  # the runtime's last alphas_cumprod of zero terminal SNR is 2**-24
_DECIBELS = frozenset({"psnr", "plain_psnr"})


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page."""
    return write_page(__doc__, PAGE, page, argv)


def page() -> str:
    """Return the page."""
    rows = [*_shapes_lines(), *_task_lines()]
    return _INTRODUCTION + "".join(rows) + "".join(_details()) + _precisions()


def _shapes_lines() -> list[str]:
    """Return the rows of the shapes model and its descendants, full captions first."""
    latest = _latest_of_shapes()
    order = ("shapes", *VARIANTS)
    lines = []
    for key in sorted(latest, key=lambda each: (order.index(each[0]), *each[1:])):
        (name, short, misread), row = key, latest[key]
        given = _SHORT if short else _CAPTION.get(name, "a full caption (CLIP)")
        lines.append(_line(name, misread or given, _right(row["counts"])))
        if row.get("counts_of_holes"):
            lines.append(_line(name, _HOLES, _right(row["counts_of_holes"])))
    return lines


def _latest_of_shapes() -> dict[tuple[str, bool, str], dict[str, Any]]:
    """Return the last row by model, short captions or not, and how the file was misread, if so."""
    latest: dict[tuple[str, bool, str], dict[str, Any]] = {}
    for row in read_records(SHAPES_ROWS):
        name, short = row.get("model", "shapes"), row["settings"].get("captions") == "short"
        latest[name, short, _misread(name, row)] = row
    return latest


def _misread(name: str, row: Mapping[str, Any]) -> str:
    """Return what a bundle was told wrongly of a model, all of which predict v; "" for nothing."""
    if row.get("prediction_type", "v_prediction") != "v_prediction":
        return _AS_NOISE
    ends_in_noise = row.get("last_alpha_cumprod", 1.0) < _NEARLY_ZERO
    is_cut = name in VARIANTS and VARIANTS[name].noise.zero_terminal_snr and not ends_in_noise
    return _SCHEDULE_CUT if is_cut else ""


def whole_images() -> dict[str, tuple[float, float]]:
    """Return the images that are right and all of them, by model; of full captions, if of any."""
    found = {
        name: _right(row["counts"])
        for (name, short, misread), row in _latest_of_shapes().items()
        if not short and not misread
    }
    for (name, short), row in _latest().items():
        if not short and WHOLE in row.metrics:
            found[name] = row.metrics[WHOLE]
    return found


def _right(counts: Mapping[str, int]) -> tuple[float, float]:
    return counts["images_right"], counts["images"]


def _task_lines() -> list[str]:
    return [
        _line(name, _SHORT if short else _FROM[name], row.metrics[WHOLE])
        for (name, short), row in _latest().items()
        if WHOLE in row.metrics
    ]


def _latest() -> dict[tuple[str, bool], TaskRow]:
    """Return the last row of each model and kind of caption, in the order of the catalogue."""
    rows = {(row.name, row.settings.get("captions") == "short"): row for row in read_rows(RESULTS)}
    places = {name: place for place, name in enumerate(MODELS)}
    return dict(sorted(rows.items(), key=lambda item: (places[item[0][0]], item[0][1])))


def _line(name: str, given: str, whole: tuple[float, float]) -> str:
    right, of = whole
    return f"| `{name}` | {given} | {share_text(right, of)} | {of:g} |\n"


def _details() -> list[str]:
    """Return the further scores of each model of the tasks."""
    lines = ["\n## Further scores\n\n| model | score | value |\n|---|---|---|\n"]
    for (name, short), row in _latest().items():
        if short:
            continue
        lines += [
            f"| `{name}` | {text} | {_value(score, row.scores[score])} |\n"
            for score, text in _SCORES.items()
            if score in row.scores
        ]
        lines += [
            f"| `{name}` | Fréchet distance to held-out images, {kind} | {distance:.3f} |\n"
            for kind, distance in row.distances.items()
        ]
    return lines


def _precisions() -> str:
    rows = [*read_rows(evaluate_precision.RESULTS)]
    devices = "; ".join(dict.fromkeys(row.device for row in rows))
    return _PRECISIONS.format(device=devices) + evaluate_precision.report(rows) + "\n"


def _value(score: str, value: float) -> str:
    if score in _DECIBELS:
        return f"{value:.1f}"
    return f"{value:.2f}" if score == "overlap" else f"{value:.1%}".replace("%", " %")


if __name__ == "__main__":
    sys.exit(main())
