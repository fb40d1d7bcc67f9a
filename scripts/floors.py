"""Write docs/floors.svg, the rooms of all packages by layer: `python -m scripts.floors`.

The layers are those that import-linter holds (pyproject.toml), and the text of a room is the
beginning of its docstring, so that the diagram says nothing that the code does not.
"""

import ast
import sys
import textwrap
import tomllib
from collections.abc import Sequence
from html import escape
from pathlib import Path

from scripts.pages import write_page

ROOT = Path(__file__).resolve().parent.parent
DIAGRAM = ROOT / "docs/floors.svg"

_PACKAGES = {
    "ldm_runtime": "ldm_runtime: one request, from the top down",
    "ldm_export": "ldm_export: one export, from the top down",
    "ldm_serve": "ldm_serve: one call, from the top down",
}
_WIDTH, _MARGIN, _TITLE, _GAP = 580, 16, 38, 8  # pixels
_CHARACTER, _LINE = 5.6, 13  # size of the small text, in pixels
_MOST_SIDE_BY_SIDE = 4  # rooms; the text of more would not fit


def main(argv: Sequence[str] | None = None) -> int:
    """Write the diagram."""
    return write_page(__doc__, DIAGRAM, diagram, argv)


def diagram() -> str:
    """Return the diagram as SVG."""
    columns = [_column(package, title, _layers(package)) for package, title in _PACKAGES.items()]
    height = max(height for _, height in columns) + _MARGIN
    parts = [
        f'<g transform="translate({_MARGIN + index * (_WIDTH + _MARGIN)}, 0)">{column}</g>'
        for index, (column, _) in enumerate(columns)
    ]
    width = _MARGIN + len(columns) * (_WIDTH + _MARGIN)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="system-ui, sans-serif">',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _layers(package: str) -> list[list[str]]:
    """Return the rooms of every layer of a package, the top layer first."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = config["tool"]["importlinter"]["contracts"]
    (layers,) = (each["layers"] for each in contracts if each.get("containers") == [package])
    return [[room.strip() for room in layer.split("|")] for layer in layers]


def _column(package: str, title: str, layers: Sequence[Sequence[str]]) -> tuple[str, int]:
    """Return one package as SVG, and its height."""
    parts = [f'<text x="0" y="22" font-size="15" font-weight="600">{escape(title)}</text>']
    top = _TITLE
    for layer in layers:
        band, rows = top, []
        for start in range(0, len(layer), _MOST_SIDE_BY_SIDE):
            row, height = _row(package, layer[start : start + _MOST_SIDE_BY_SIDE], top + _GAP)
            rows += row
            top += height + _GAP
        parts.append(
            f'<rect x="0" y="{band}" width="{_WIDTH}" height="{top - band + _GAP}" rx="7" '
            f'fill="#f4f4f1"/>'
        )
        parts += rows
        top += 2 * _GAP
    return "\n".join(parts), top


def _row(package: str, rooms: Sequence[str], top: int) -> tuple[list[str], int]:
    """Return rooms side by side as SVG, and their height."""
    width = (_WIDTH - (len(rooms) + 1) * _GAP) / len(rooms)
    texts = [
        textwrap.wrap(_purpose(package, room), int((width - 16) / _CHARACTER)) for room in rooms
    ]
    height = 24 + _LINE * max(map(len, texts)) + 4
    parts = []
    for index, (room, lines) in enumerate(zip(rooms, texts, strict=True)):
        left = _GAP + index * (width + _GAP)
        parts += [
            f'<rect x="{left:g}" y="{top}" width="{width:g}" height="{height}" rx="5" '
            f'fill="#ffffff" stroke="#8aa4c8"/>',
            f'<text x="{left + 8:g}" y="{top + 17}" font-size="12.5" font-weight="600">'
            f"{escape(room)}</text>",
            *(
                f'<text x="{left + 8:g}" y="{top + 31 + number * _LINE}" font-size="10.5" '
                f'fill="#444444">{escape(line)}</text>'
                for number, line in enumerate(lines)
            ),
        ]
    return parts, height


def _purpose(package: str, room: str) -> str:
    """Return the first sentence of a room's docstring, without its name."""
    folder = ROOT / package / room
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    sentence = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")[
        0
    ]
    name, _, rest = " ".join(sentence.split()).partition(": ")
    text = rest if rest and name.lower().startswith(room[:4]) else " ".join(sentence.split())
    return text.replace("`", "")


if __name__ == "__main__":
    sys.exit(main())
