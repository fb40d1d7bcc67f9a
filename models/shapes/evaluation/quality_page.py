"""Writes `docs/quality.md` from the cells of a sweep."""

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from models.shapes.evaluation.cells import FOR_OTHER_MODELS, Cell
from models.shapes.evaluation.quality import (
    FARTHER,
    MEASURES,
    as_good_as_many_steps,
    by_sampler,
    farthest_as_good,
    label,
    lowest_as_good,
    share_of,
)

#: Digits of a hash on the page.
_DIGITS = 12
#: Bundles of weights that no longer come along, by the beginning of their hash.
_EARLIER_WEIGHTS: Mapping[str, str] = MappingProxyType(
    {
        "6eae4c3c1e26": "Its weights are those of commit c2dc2d8, measured on 2026-11-26; "
        "`shapes.ckpt` has had others since 2026-12-01 (8779d1b, 28e950d), which generate in 50 "
        "steps of `ddim` with eta 1 and guidance 3 unless told otherwise, and of which nothing "
        "here is measured."
    }
)
_HEADINGS = tuple(measure.replace("_", " ") for measure in MEASURES)


def page(cells: Sequence[Cell]) -> str:
    """Return the page in Markdown."""
    sections = [_opening(cells[-1]), _fewest(cells), _meaning(cells)]
    for measure, heading in zip(MEASURES, _HEADINGS, strict=True):
        sections.append(_by_steps(f"{heading} right", cells, partial(_right, measure=measure)))
    sections += [
        _by_steps("distance", cells, lambda cell: f"{cell.distance:.3g}"),
        _by_steps("calls", cells, lambda cell: str(cell.calls)),
        _by_steps("seconds per image", cells, lambda cell: f"{cell.median_seconds:.2f}"),
    ]
    return "\n\n".join(sections) + "\n"


def _opening(last: Cell) -> str:
    bundle = last.bundle_sha256[:_DIGITS]
    model = _wrapped(f"Bundle `{bundle}`. {_EARLIER_WEIGHTS.get(bundle, '')}".rstrip())
    return f"""# Quality against speed

These figures are of one small model of shapes, which predicts v. Stable Diffusion predicts noise,
and the order of its samplers may be another: take from this page how to measure, not what to use.

How many denoiser calls an image needs: every sampler of this package but `tcd`, with several
numbers of steps, generates the same {last.settings["captions"]} held-out captions from the same
noise with the [shapes model](../models/shapes/README.md), guidance
{last.settings["guidance_scale"]}. Written by `python models/shapes/evaluate.py --report`
from what `--sweep` measured; every cell is a line of `benchmarks/results/shapes_sweep.jsonl`.
{model}

![the shares that are right, and the distance, over denoiser calls](quality.png)"""


def _fewest(cells: Sequence[Cell]) -> str:
    good = as_good_as_many_steps(cells)
    fewest: dict[str, Cell] = {}
    for cell in good:
        fewest.setdefault(cell.sampler, cell)
    lines = ["## The fewest calls", _wrapped(_verdict(good))]
    if good:
        heads = ("sampler", "steps", "calls", *_HEADINGS, "distance", "seconds")
        lines.append(_table(heads, map(_row, fewest.values())))
    never = [f"`{label(name)}`" for name in by_sampler(cells) if name not in fewest]
    if never:
        lines.append(_wrapped(f"With no number of steps measured: {', '.join(never)}."))
    if any(cell.sampler in FOR_OTHER_MODELS for cell in cells):
        lines.append("Other models: made for models that were distilled for it, as this was not.")
    return "\n\n".join(lines)


def _verdict(good: Sequence[Cell]) -> str:
    if not good:
        return "No cell is as good as many steps in everything at once."
    return (
        f"**`{good[0].sampler}` with {good[0].steps} steps** ({good[0].calls} calls) is as good as "
        "many steps with the fewest calls, and of as many calls, it has the most whole images "
        "right. For each sampler, the fewest with which it is:"
    )


def _row(cell: Cell) -> tuple[str, ...]:
    shares = (_right(cell, measure) for measure in MEASURES)
    costs = (f"{cell.distance:.3g}", f"{cell.median_seconds:.2f}")
    return (f"`{cell.sampler}`", str(cell.steps), str(cell.calls), *shares, *costs)


def _meaning(cells: Sequence[Cell]) -> str:
    last = cells[-1]
    error = math.sqrt(0.9 * 0.1 / last.counts.objects)
    lowest = ", ".join(
        f"{_percent(lowest_as_good(cells, measure))} of {heading}"
        for measure, heading in zip(MEASURES, _HEADINGS, strict=True)
    )
    devices = "; ".join(dict.fromkeys(f"{cell.device}, {cell.backend}" for cell in cells))
    points = (
        "**Objects, relations, whole images**: what `detector.py` reads in the images, against "
        f"the captions, which ask for {last.counts.objects} objects and {last.counts.relations} "
        f"relations. A share of 90 % of the objects has a standard error of {_percent(error)}.",
        "**Distance**: squared Fréchet distance on random convolutional features (`frechet.py`) "
        f"between the images and {last.settings['layouts']} renders of each caption in other "
        f"layouts. As many right images are at {last.floor:.3g}. It compares only within this "
        "page.",
        "**As good as many steps**: at most one percentage point and one standard error below what "
        f"the median sampler reaches with its most steps (so from {lowest}) and at most "
        f"{FARTHER:g} times as far from right images (up to {farthest_as_good(cells):.3g}).",
        "**Calls** of the denoiser for one image, counted; each is one call of the UNet with two "
        "samples.",
        f"**Seconds**: the median of the images, from text to pixels, on {devices}.",
    )
    return "## What is measured\n\n" + "\n".join(_wrapped(f"* {point}") for point in points)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, subsequent_indent="  " if text.startswith("* ") else "")


def _right(cell: Cell, measure: str) -> str:
    return _percent(share_of(cell, measure))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _by_steps(title: str, cells: Sequence[Cell], form: Callable[[Cell], str]) -> str:
    """Return a heading and a table of samplers by steps."""
    steps = sorted({cell.steps for cell in cells})
    rows = []
    for sampler, own in by_sampler(cells).items():
        texts = {cell.steps: form(cell) for cell in own}
        rows.append((f"`{label(sampler)}`", *(texts.get(count, "") for count in steps)))
    table = _table(("sampler", *(f"{count} steps" for count in steps)), rows)
    return f"## {title.capitalize()}, by steps\n\n{table}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ("---", *["---:"] * (len(heads) - 1))
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, rule, *rows))
