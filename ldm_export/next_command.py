"""The command of `ldm` that a user types after an export, in the form that fits the task."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from ldm_runtime.specs.model import Task

#: An example of what each task needs, as arguments of `ldm generate`.
_NEEDS: Mapping[Task, tuple[str, ...]] = MappingProxyType(
    {
        "unconditional": (),
        "class-to-image": ("--class-label", "1"),
        "text-to-image": ("a large red circle left of a small blue square on a white background",),
        "layout-to-image": ("--layout", "boxes.json"),
        "semantic-synthesis": ("--segmentation", "map.png"),
        "super-resolution": ("--image", "small.png"),
        "text-super-resolution": ("--image", "small.png"),
        "inpainting": ("--image", "photo.png", "--mask-image", "mask.png"),
        "text-inpainting": ("a red circle", "--image", "photo.png", "--mask-image", "mask.png"),
        "image-editing": ("make it a red circle", "--image", "photo.png"),
        "image-variation": ("--image", "photo.png"),
        "depth-to-image": ("a red circle", "--depth-map", "depth.png"),
        "retrieval": ("--embeddings", "vectors.npy"),
        "autoencoder": ("--image", "photo.png"),
    }
)


def next_command(task: Task, bundle: Path) -> str:
    """Return the command that generates a first image from a bundle, quoted for a shell."""
    return shlex.join(("ldm", "generate", *_NEEDS[task], "--bundle", str(bundle)))
