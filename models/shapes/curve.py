"""Draw the training log as `models/shapes/curve.png`.

python models/shapes/curve.py
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
WIDTH, HEIGHT, MARGIN = 440, 300, 52
_INK, _GRID, _LINE, _DOTS = "#222222", "#dddddd", "#3b6fb6", "#c0392b"

Point = tuple[float, float]


def read_log(stage: str, key: str) -> list[Point]:
    """Return (step, value) of every row of a stage that has `key`."""
    rows = [json.loads(line) for line in (HERE / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row[key]) for row in rows if row["stage"] == stage and key in row]


def draw_chart(
    title: str, line: Sequence[Point], dots: Sequence[Point], *, logarithmic: bool
) -> Image.Image:
    """Return a chart with one line and one series of dots over training steps."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    scale = math.log10 if logarithmic else float
    values = [scale(value) for _, value in (*line, *dots)]
    low, high = min(values), max(values)
    last_step = max(step for step, _ in (*line, *dots))

    def place(point: Point) -> Point:
        step, value = point
        x = MARGIN + (WIDTH - 1.5 * MARGIN) * step / last_step
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (scale(value) - low) / (high - low)
        return x, y

    for fraction in (0, 0.25, 0.5, 0.75, 1):
        level = low + fraction * (high - low)
        value = 10**level if logarithmic else level
        y = place((0, value))[1]
        canvas.line([(MARGIN, y), (WIDTH - MARGIN / 2, y)], fill=_GRID)
        canvas.text((MARGIN - 6, y), f"{value:.3g}", fill=_INK, font=font, anchor="rm")
        x = MARGIN + (WIDTH - 1.5 * MARGIN) * fraction
        text = f"{fraction * last_step:.0f}"
        canvas.text((x, HEIGHT - MARGIN + 6), text, fill=_INK, font=font, anchor="ma")
    if line:
        canvas.line([place(point) for point in line], fill=_LINE, width=2)
    for x, y in map(place, dots):
        canvas.ellipse([(x - 3, y - 3), (x + 3, y + 3)], fill=_DOTS)
    canvas.text((WIDTH / 2, 12), title, fill=_INK, font=font, anchor="ma")
    canvas.text((WIDTH / 2, HEIGHT - 22), "step", fill=_INK, font=font, anchor="ma")
    return image


def main() -> None:
    """Draw both stages side by side."""
    charts = [
        draw_chart(
            "first stage: PSNR on held-out pictures (dB)",
            [],
            read_log("autoencoder", "psnr"),
            logarithmic=False,
        ),
        draw_chart(
            "diffusion: loss (line), held-out loss (dots)",
            read_log("diffusion", "loss")[2:],
            read_log("diffusion", "held_out_loss"),
            logarithmic=True,
        ),
    ]
    sheet = Image.new("RGB", (len(charts) * WIDTH, HEIGHT), "white")
    for index, chart in enumerate(charts):
        sheet.paste(chart, (index * WIDTH, 0))
    sheet.save(HERE / "curve.png", optimize=True)


if __name__ == "__main__":
    main()
