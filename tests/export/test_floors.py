"""The diagram of the rooms is that of the code, and every room is in it."""

import importlib
from pathlib import Path

import pytest

from scripts import floors


def test_the_committed_diagram_is_up_to_date():
    assert floors.DIAGRAM.read_text() == floors.diagram(), "run `make docs`"


@pytest.mark.parametrize("package", ["ldm_runtime", "ldm_export"])
def test_every_room_is_in_the_diagram(package):
    folder = Path(importlib.import_module(package).__path__[0])
    rooms = {path.parent.name for path in folder.glob("*/__init__.py")} - {"vocabularies"}

    assert rooms
    assert {room for room in rooms if f">{room}</text>" not in floors.diagram()} == set()
