"""Draw the training log as `models/shapes/curve.png`.

python models/shapes/curve.py
"""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

import charts

HERE = Path(__file__).parent
_LINE, _DOTS = "#3b6fb6", "#c0392b"


def read_log(stage: str, key: str) -> list[charts.Point]:
    """Return (step, value) of every row of a stage that has `key`."""
    rows = [json.loads(line) for line in (HERE / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row[key]) for row in rows if row["stage"] == stage and key in row]


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
    """Return both stages side by side."""
    first_stage = training_chart(
        "first stage: PSNR on held-out pictures (dB)",
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
    return charts.grid([first_stage, diffusion], columns=2)


if __name__ == "__main__":
    draw_curves().save(HERE / "curve.png", optimize=True)
