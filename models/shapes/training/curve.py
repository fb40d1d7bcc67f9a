"""Plot the training log as `models/shapes/curve.png` and `curve_tasks.png`.

python models/shapes/training/curve.py
"""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from models.shapes.evaluation import charts

HERE = Path(__file__).resolve().parents[1]
_LINE, _DOTS = "#3b6fb6", "#c0392b"
#: Each training run's name in the log and in the legend, its colour and its marker.
_RUNS = (
    ("unconditional", "unconditional", "#3b6fb6", "dot"),
    ("unconditional_offset", "  with offset noise (not shipped)", "#9db9dd", "dot"),
    ("class_to_image", "class, from layout", "#c0392b", "square"),
    ("class_to_image_alone", "  by itself, other noise (not shipped)", "#e59a92", "square"),
    ("class_to_image_adamw", "  by itself, AdamW (not shipped)", "#e5c592", "square"),
    ("text_to_image_bert", "text, BERT", "#2f8f4e", "triangle"),
    ("layout_to_image", "layout", "#8a4fb3", "diamond"),
    ("semantic_synthesis", "semantic map, AdamW", "#c98a1b", "dot"),
    ("super_resolution", "super-resolution, AdamW", "#2aa5a5", "square"),
    ("inpainting", "inpainting", "#555555", "triangle"),
)


def read_log(run: str, key: str) -> list[charts.Point]:
    """Return (step, value) of every row of a training run that has `key`."""
    rows = [json.loads(line) for line in (HERE / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row[key]) for row in rows if row["stage"] == run and key in row]


def training_chart(
    title: str, line: Sequence[charts.Point], dots: Sequence[charts.Point], *, logarithmic: bool
) -> Image.Image:
    """Return a chart with one line and one series of dots over training steps."""
    points = [*line, *dots]
    steps = charts.axis_over("step", [0, *(step for step, _ in points)], form=".0f")
    values = charts.axis_over("", [value for _, value in points], logarithmic=logarithmic)
    series = [
        charts.Series(label="line", points=line, color=_LINE),
        charts.Series(label="dots", points=dots, color=_DOTS, mark="dot", line=False),
    ]
    return charts.draw_chart(title, steps, values, series)


def draw_curves() -> Image.Image:
    """Return the curves of both networks side by side."""
    autoencoder = training_chart(
        "autoencoder: PSNR on held-out images (dB)",
        [],
        read_log("autoencoder", "psnr"),
        logarithmic=False,
    )
    diffusion = training_chart(
        "diffusion: loss (line), held-out loss (dots)",
        read_log("diffusion", "loss")[2:],
        read_log("diffusion", "held_out_loss"),
        logarithmic=True,
    )
    return charts.grid([autoencoder, diffusion], columns=2)


def draw_tasks() -> Image.Image:
    """Return the held-out losses of the models in one chart."""
    series = [
        charts.Series(label=label, points=read_log(run, "held_out_loss"), color=color, mark=mark)
        for run, label, color, mark in _RUNS
    ]
    points = [point for each in series for point in each.points]
    steps = charts.axis_over("step", [0, *(step for step, _ in points)], form=".0f")
    losses = charts.logarithmic_axis("", [loss for _, loss in points])
    chart = charts.draw_chart("held-out loss", steps, losses, series, size=(560, 360))
    return charts.side_by_side(chart, charts.draw_legend(series, 270))


if __name__ == "__main__":
    draw_tasks().save(HERE / "curve_tasks.png", optimize=True)
    draw_curves().save(HERE / "curve.png", optimize=True)
