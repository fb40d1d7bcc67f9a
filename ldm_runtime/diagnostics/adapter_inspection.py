"""Description of an adapter's file, such as a LoRA."""

from collections import Counter
from pathlib import Path
from typing import Any

from ldm_runtime.adapters.files import read_adapter
from ldm_runtime.escaping import shortened


def inspect_adapter(path: Path) -> dict[str, Any] | None:
    """Describe an adapter, or return None for a file that is not one.

    Its own metadata may say anything.
    """
    try:
        adapter = read_adapter(path)
    except ValueError:
        return None
    layers = adapter.layers.values()
    ranks = sorted({layer.rank for layer in layers if layer.rank is not None})
    return {
        "kind": "adapter",
        "path": str(path),
        "sha256": adapter.sha256,
        "layers": dict(Counter(component for component, _ in adapter.layers)),
        "kinds": dict(Counter(layer.kind for layer in layers)),
        "ranks": ranks,
        "metadata": shortened(adapter.metadata),
    }
