"""Write docs/families.md from the table of families and measured rows: `make docs`.

The rows of images are those that `pytest tests/reference --families FILE` wrote, those of released
sizes are of `benchmarks/full_size.py`, and the scores of the trained models of
`models/shapes/evaluate.py` and `evaluate_tasks.py`.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_export.families.records import Family
from ldm_export.families.table import FAMILIES
from measuring.rows import read_records
from scripts.pages import write_page
from scripts.released_page import ROWS as RELEASED_ROWS
from scripts.trained_page import whole_images

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/families.md"
ROWS = ROOT / "benchmarks/results/families.jsonl"

_INTRODUCTION = """\
# Checkpoint families

<!-- Written by `python -m scripts.families_page`; change that script, not this page. -->

Every family of checkpoints that `ldm-export` knows is a line, by the name that an export prints.
Released models that differ from another family in sizes alone share its line. Nothing here is
estimated: a cell without a measurement has a dash.

| family | recognised | torch | fp32 | fp16 | RTX engines | peak memory | trained example |
|---|---|---|---|---|---|---|---|
"""

_LEGEND = """
* **recognised**: by its tensors, in a small checkpoint with random weights, and where it says so in
  one of the released size.
* **torch**, **fp32**, **fp16**: the lowest PSNR of an image of the small checkpoint, against
  diffusers over the same weights and noise; what diffusers has no pipeline for is a plain loop over
  its networks. The runtime samples with the exporter's networks in torch, with the fp32 ONNX
  graphs, or with the fp16 ones. The bounds are 60, 60 and 35 dB; with a codebook 30, since near
  ties of random weights take other codes. Images are compared after rounding
  to 8 bits, "equal" to the last of them. fp16 graphs run on a CPU here, where ONNX Runtime computes
  most nodes in fp32: the figure is the price of weights in fp16, and not that of a GPU's rounding.
  A dash: not measured through graphs, which every export
  compares with torch for itself. Written by `python -m pytest tests/reference --families
  benchmarks/results/families.jsonl`, and with `--graphs`.
* **RTX engines**: seconds to build the TensorRT-RTX engines of all networks at the released size,
  for five compute capabilities, without a GPU. **peak memory**: of the export of that size. Both
  are of the largest model of a line, [measured](released-models.md) on 2 cores with random weights.
  "As" another family: it has that one's networks, but for the channels of one convolution, a small
  projection or the names of its tensors, and was not measured again. A dash alone is a size that
  was not measured: `python benchmarks/full_size.py` measures those it knows.
* **trained example**: the share of [whole images that are right](trained-models.md) of a model that
  comes along. A dash: none of this family comes along.

## Recognised and refused

These are known by name, so that their checkpoints are refused with a reason and a remedy and never
exported as something else:

"""

#: Features that are sizes: a family that has these in addition is another one, released.
_SIZES = frozenset(
    {
        *("model_channels", "in_channels", "out_channels", "middle_channels", "context_dim"),
        *("classes", "autoencoder_channels", "factor", "latent_channels", "codebook_size"),
        "middle_attention",
    }
)
#: Families whose networks at the released size are those of another.
_SAME_NETWORKS: Mapping[str, str] = {
    "stable-diffusion-1-inpainting": "stable-diffusion-1",
    "instruct-pix2pix": "stable-diffusion-1",
    "stable-diffusion-1-lcm": "stable-diffusion-1",
    "stable-diffusion-2-sgm": "stable-diffusion-2",
    "stable-diffusion-2-inpainting": "stable-diffusion-2",
    "playground-v2.5": "stable-diffusion-xl",
    "cosxl": "stable-diffusion-xl",
    "cosxl-edit": "stable-diffusion-xl",
    "stable-diffusion-xl-inpainting": "stable-diffusion-xl",
    "stable-diffusion-xl-instruct-pix2pix": "stable-diffusion-xl",
    "stable-diffusion-xl-lcm": "stable-diffusion-xl",
    "ssd-1b-lcm": "ssd-1b",
}
#: The trained models of a family.
TRAINED: Mapping[str, tuple[str, ...]] = {
    "stable-diffusion-1": ("shapes", "shapes_zero_snr"),
    "stable-diffusion-1-inpainting": ("shapes_inpainting",),
    "ldm-unconditional-scale-shift": ("unconditional",),
    "ldm-class": ("class_to_image",),
    "ldm-text-vq": ("text_to_image_bert",),
    "ldm-layout": ("layout_to_image",),
    "ldm-semantic-synthesis": ("semantic_synthesis",),
    "ldm-super-resolution": ("super_resolution",),
    "ldm-inpainting": ("inpainting",),
}
_HIGHEST = 120.0  # what equal images are recorded as

Row = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page."""
    return write_page(__doc__, PAGE, page, argv)


def page() -> str:
    """Return the page."""
    measured, released = lowest_psnr(read_records(ROWS)), _largest(read_records(RELEASED_ROWS))
    lines = [
        _line(kind, names, measured.get(kind, {}), released) for kind, names in groups().items()
    ]
    refused = [f"* {each.name}\n" for each in FAMILIES if each.family_defaults is None]
    return _INTRODUCTION + "".join(lines) + _LEGEND + "".join(refused)


def groups() -> dict[str, list[str]]:
    """Return the families that share a line, by the name of the one that fits every size."""
    found: dict[str, list[str]] = {}
    for family in FAMILIES:
        if family.family_defaults is not None:
            found.setdefault(kind_of(family).name, []).append(family.name)
    return found


def kind_of(family: Family) -> Family:
    """Return the exported family that a family differs from in sizes alone, or itself."""
    kinds = [
        each
        for each in FAMILIES
        if each.family_defaults is not None
        and each.features.items() <= family.features.items()
        and family.features.keys() - each.features.keys() <= _SIZES
    ]
    # One that fits every size has no features that are; of several the one with most in common.
    return min(
        kinds,
        key=lambda each: (len(each.features.keys() & _SIZES - {"classes"}), -len(each.features)),
    )


def lowest_psnr(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Return the lowest PSNR in dB by family and precision, of the last row of each test."""
    latest = {(row["family"], row["test"]): row["psnr"] for row in rows}
    lowest: dict[str, dict[str, float]] = {}
    for (family, _), psnr in latest.items():
        known = lowest.setdefault(family, {})
        for precision, value in psnr.items():
            known[precision] = min(value, known.get(precision, value))
    return lowest


def _largest(rows: Iterable[Row]) -> dict[str, Row]:
    """Return the last row of the largest model of each family that was measured."""
    latest = {row["name"]: row for row in rows if "export" in row and not row["failure"]}
    by_size = sorted(latest.values(), key=lambda row: int(row["checkpoint_bytes"]))
    return {row["family"]: row for row in by_size}


def _line(
    kind: str, names: Sequence[str], psnr: Mapping[str, float], released: Mapping[str, Row]
) -> str:
    others = [name for name in names if name != kind]
    title = f"`{kind}`" + (": " + ", ".join(f"`{name}`" for name in others) if others else "")
    own = [released[name] for name in names if name in released]
    large = max(own, key=lambda row: int(row["checkpoint_bytes"]), default=None)
    seen = [
        *(["small"] if psnr else []),
        *(["released size"] if large is not None else []),
    ]
    cells = (
        title,
        ", ".join(seen) or "–",
        *(_decibels(psnr.get(each)) for each in ("torch", "fp32", "fp16")),
        *_released(kind, large),
        ", ".join(map(_score, TRAINED.get(kind, ()))) or "–",
    )
    return "| " + " | ".join(cells) + " |\n"


def _decibels(value: float | None) -> str:
    if value is None:
        return "–"
    return "equal" if value >= _HIGHEST else f"{value:.0f} dB"


def _released(kind: str, row: Row | None) -> tuple[str, str]:
    """Return the cells of engines and memory."""
    if row is None:
        other = _SAME_NETWORKS.get(kind)
        cell = "–" if other is None else f"– (as `{other}`)"
        return cell, cell
    builds, missing = row["engines"], row["why_no_engines"]
    engines = "–"
    if builds:
        rest = f", {len(missing)} missing" if missing else ""
        engines = f"{sum(each['seconds'] for each in builds):.0f} s{rest}"
    return engines, f"{row['export']['peak_bytes'] / 1e9:.1f} GB"


def _score(name: str) -> str:
    right, of = whole_images()[name]
    return f"{right / of:.1%} (`{name}`)".replace("%", " %")


if __name__ == "__main__":
    sys.exit(main())
