"""One component of a model as it is stored: in one file, or in a folder with its configuration.

Source: `save_pretrained` of diffusers 0.42.1 and transformers 5, and the names that their earlier
versions gave to variants and to parts.
"""

import logging
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from ldm_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from ldm_export.checkpoint.stored_tensors import StoredTensor
from ldm_export.errors import CheckpointError
from ldm_export.hyperparameters.shapes import listed
from ldm_export.intake.json_files import read_json

_LOGGER = logging.getLogger(__name__)

_CONFIG = "config.json"
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+))?"
    r"\.(?P<format>safetensors|bin)(?P<index>\.index(?:\.(?P<of>\w+))?\.json)?"
)
#: Variants from the most to the least precise; "" is the file without a variant's name.
_VARIANTS = ("", "fp16", "bf16")


@dataclass(frozen=True, kw_only=True)
class StoredComponent:
    """The tensors of a component under the names that they are stored by.

    Attributes:
        path: The file or the folder.
        tensors: By name.
        config: Entries of its `config.json`; None if there is none.
        files: Every file that was read, by its name within the component.
        opened: The files that hold the tensors.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, object] | None = None
    files: Mapping[str, Path]
    opened: tuple[Checkpoint, ...] = field(repr=False)

    @property
    def unusual_globals(self) -> tuple[str, ...]:
        """Names in its pickles that torch does not write, see `Checkpoint`."""
        return tuple(name for each in self.opened for name in each.unusual_globals)


def open_component(path: Path) -> StoredComponent:
    """Open a component's file, or the weights in its folder.

    Raises:
        CheckpointError: It cannot be read, or the folder holds no weights, or several variants of
            them of which none is the obvious one, or parts that do not fit together.
    """
    if not path.is_dir():
        checkpoint = open_checkpoint(path)
        return StoredComponent(
            path=path,
            tensors=checkpoint.tensors,
            files=checkpoint.files,
            opened=(checkpoint,),
        )
    weights, config = _weights_file(path), path / _CONFIG
    files = {weights.name: weights} | ({_CONFIG: config} if config.is_file() else {})
    entries = read_json(config) if config.is_file() else None
    _LOGGER.info("reading %s", weights)
    if weights.suffix != ".json":
        checkpoint = open_checkpoint(weights)
        tensors, opened = checkpoint.tensors, [checkpoint]
    else:
        tensors, opened = _open_parts(weights)
    return StoredComponent(
        path=path,
        tensors=tensors,
        config=entries,
        files=MappingProxyType(files | {each.path.name: each.path for each in opened}),
        opened=tuple(opened),
    )


def _weights_file(folder: Path) -> Path:
    """Return the file, or the index of parts, of the most precise weights in a folder.

    Full precision goes before a variant, safetensors before pickles, one file before parts.
    """
    found: dict[str, list[tuple[bool, bool, Path]]] = {}
    for path in sorted(folder.iterdir()):
        if match := _WEIGHTS.fullmatch(path.name):
            variant = match["variant"] or match["of"] or ""
            rank = (match["format"] == "bin", match["index"] is not None, path)
            found.setdefault(variant, []).append(rank)
    if not found:
        raise CheckpointError(
            folder,
            "holds no weights that can be read; a file such as diffusion_pytorch_model.safetensors "
            "or model.safetensors was expected",
        )
    known = [variant for variant in _VARIANTS if variant in found]
    if not known and len(found) > 1:
        raise CheckpointError(
            folder,
            f"holds weights in the variants {', '.join(sorted(found))} and none without a "
            "variant's name; keep the one to export",
        )
    return min(found[(known or list(found))[0]])[2]


def _open_parts(index: Path) -> tuple[Mapping[str, StoredTensor], list[Checkpoint]]:
    """Open the files that an index names, and check that they hold the tensors that it says."""
    places = _places(index)
    with ExitStack() as stack:
        parts = {
            name: stack.enter_context(open_checkpoint(index.parent / name))
            for name in dict.fromkeys(places.values())
        }
        stored = {(name, part) for part, each in parts.items() for name in each.tensors}
        if wrong := stored ^ set(places.items()):
            names = listed(sorted(f"{name} in {part}" for name, part in wrong))
            raise CheckpointError(
                index,
                f"and its parts do not hold the same tensors ({names}); get the folder again",
            )
        stack.pop_all()
    tensors = {name: parts[part].tensors[name] for name, part in places.items()}
    return MappingProxyType(tensors), list(parts.values())


def _places(index: Path) -> dict[str, str]:
    """Return the file of every tensor, which lies next to the index."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(index, "has no weight_map, which says where tensors are")
    for name in places.values():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
            raise CheckpointError(
                index, f"names {name!a:.100}, which is not a file next to it; get the folder again"
            )
    return places
