"""Adapters merged into the weights of a bundle, in memory; its files stay as they are.

A weight is what its file says with the updates of all adapters, computed in float32 and rounded
once to the type that the bundle stores. Without adapters a model is the bundle's, bit for bit.
"""

import math
import numbers
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from ldm_runtime.adapters.files import AdapterFile, LayerName, read_adapter
from ldm_runtime.adapters.layers import AdapterLayer
from ldm_runtime.adapters.names import Target, adapter_targets
from ldm_runtime.bundle.graph_weights import StoredWeight, stored_weights
from ldm_runtime.bundle.manifest import ComponentRecord, Manifest
from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.reading import shown
from ldm_runtime.specs.components import COMPONENTS

#: Networks whose weights adapters change.
ADAPTED_NETWORKS = frozenset({"unet", "text_encoder", "text_encoder_2"})
_SCALE_AXES = 3
_ENCODER_LAYER = re.compile(r"(?<=_encoder_layers_)\d+")

#: A path, or the bytes of a file.
AdapterInput: TypeAlias = str | os.PathLike[str] | bytes
#: The scales of adapters; the keys of a mapping are of one type, so that each is listed.
Adapters: TypeAlias = (
    Mapping[str, float]
    | Mapping[Path, float]
    | Mapping[bytes, float]
    | Mapping[AdapterInput, float]
)
Kind = Literal["weight", "bias"]
Array = npt.NDArray[np.floating]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter of a model, such as a LoRA.

    Attributes:
        file: Its file.
        scale: Factor of its updates: 1 is as it was trained, 0 is without it.
    """

    file: AdapterFile
    scale: float


@dataclass(frozen=True, kw_only=True)
class Change:
    """One layer of an adapter, and the layer of the model that it changes.

    Attributes:
        adapter: The adapter.
        layer: Its layer.
        target: The layer of the model.
        kind: Which parameter of it.
    """

    adapter: Adapter
    layer: AdapterLayer
    target: Target
    kind: Kind

    @property
    def shapes(self) -> tuple[Hashable, ...]:
        """What decides whether it fits a parameter of a shape."""
        tensors = sorted((name, each.shape) for name, each in self.layer.tensors.items())
        return (self.kind, self.target.part, *tensors)

    def apply(self, parameter: Float32Array) -> None:
        """Change a parameter of a network in place."""
        part = parameter[self.target.rows(len(parameter))]
        change = self.layer.adapted if self.kind == "weight" else self.layer.adapted_bias
        part[...] = change(part, self.adapter.scale)


class MergedAdapters:
    """The adapters of a generator, as changes of the weights of its bundle.

    Args:
        adapters: The adapters, in the order in which they change a weight.
        bundle: The bundle's folder.
        manifest: Its manifest.

    Raises:
        ValueError: In one sentence, which adapter is for another model.
        BundleError: A graph of the bundle is not one.
    """

    def __init__(self, adapters: Sequence[Adapter], bundle: Path, manifest: Manifest) -> None:
        self.adapters = tuple(adapters)
        self._bundle, self._manifest = bundle, manifest
        for adapter in adapters:
            self._check(adapter.file)

    @property
    def key(self) -> str:
        """A text that is the same for the same changes only; empty for none."""
        return "\n".join(f"{each.file.sha256} {each.scale!r}" for each in self.adapters)

    def changed_weights(self, component: ComponentRecord, graph: Path) -> dict[str, Array]:
        """Return the weights of a graph that the adapters change, as its weight file stores them.

        Args:
            component: The component.
            graph: One of its graphs.

        Raises:
            RequestError: A layer of an adapter does not fit, or a weight would be beyond the range
                of the type that it is stored in.
        """
        changes = self.changes_of(COMPONENTS[component.name].network)
        weights = stored_weights(graph) if changes else {}
        file = self._bundle / component.weights_file
        inside = changes.keys() - weights.keys() if component.name in ADAPTED_NETWORKS else ()
        if inside:
            raise RequestError(
                "adapters",
                f"{min(inside)} is so small that it is a part of the graph; it cannot "
                "be changed, so leave out the adapter that does",
            )
        return {
            name: _changed(name, weights[name], file, changes[name])
            for name in changes.keys() & weights.keys()
        }

    def check_shapes(self) -> None:
        """Check that the layers of the adapters fit the model, one of each shape.

        Raises:
            RequestError: One does not.
        """
        checked: set[Hashable] = set()
        for component in self._manifest.components:
            file = self._bundle / component.weights_file
            for name, stored, change in self._changes_in(component):
                shapes = (stored.shape, stored.is_transposed, change.shapes)
                if shapes not in checked:
                    _adapted(name, stored, file, [change])
                    checked.add(shapes)

    def _changes_in(self, component: ComponentRecord) -> Iterator[tuple[str, StoredWeight, Change]]:
        """Yield every change of a weight outside the component's graph."""
        changes = self.changes_of(component.name)
        weights = stored_weights(self._bundle / component.graphs[0].file) if changes else {}
        for name in changes.keys() & weights.keys():
            yield from ((name, weights[name], change) for change in changes[name])

    def changes_of(self, network: str) -> dict[str, list[Change]]:
        """Return what the adapters change of a network, by the names of its parameters."""
        changes: dict[str, list[Change]] = {}
        for adapter in self.adapters:
            for name, layer in adapter.file.layers.items():
                target = self._targets.get(name)
                if target is None or target.component != network:
                    continue
                for kind in get_args(Kind):
                    if layer.changes_weight if kind == "weight" else layer.changes_bias:
                        change = Change(adapter=adapter, layer=layer, target=target, kind=kind)
                        changes.setdefault(target.parameter_of(kind), []).append(change)
        return changes

    def _check(self, file: AdapterFile) -> None:
        """Check that the model has every layer of an adapter."""
        unknown = [
            name for name in file.layers if name not in self._targets and not self._is_beyond(name)
        ]
        if unknown:
            component, layer = unknown[0]
            raise ValueError(
                f"{file.name} changes {len(unknown)} layers that this model has not, such as "
                f"{layer} of its {component}; give an adapter for this model"
            )
        first: dict[Target, LayerName] = {}
        for name in file.layers.keys() & self._targets.keys():
            if (other := first.setdefault(self._targets[name], name)) != name:
                raise ValueError(
                    f"{file.name} has one layer under two names, {other[1]} and {name[1]}; delete "
                    "one of them"
                )

    def _is_beyond(self, name: LayerName) -> bool:
        """Say whether a layer of a text encoder comes after the last one that the model runs."""
        component, layer = name
        return (component, _ENCODER_LAYER.sub("0", layer)) in self._targets

    @cached_property
    def _targets(self) -> Mapping[LayerName, Target]:
        """The layers of the model's networks, by every name that they have in adapters."""
        return adapter_targets(
            {
                record.name: list(stored_weights(self._bundle / record.graphs[0].file))
                for record in self._manifest.components
                if record.name in ADAPTED_NETWORKS
            }
        )


def read_adapters(files: Adapters) -> tuple[Adapter, ...]:
    """Read the files of adapters.

    Args:
        files: The factor of the updates of each file.

    Raises:
        ValueError: In one sentence, which file cannot be read, or which factor is not a number.
    """
    adapters = []
    for each, scale in files.items():
        file = read_adapter(each)
        adapters.append(Adapter(file=file, scale=plain_scale(file.name, scale)))
    return tuple(adapters)


def plain_scale(name: str, scale: object) -> float:
    """Return the scale of an adapter; NumPy's numbers become Python's, which can be recorded.

    Args:
        name: The adapter, for the message.
        scale: What the caller gave.

    Raises:
        ValueError: In one sentence, that it is not a finite number.
    """
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise ValueError(f"{name} has the scale {shown(repr(scale))}; give a number, such as 1")
    try:
        plain = float(scale)
    except OverflowError:
        plain = math.inf
    if not math.isfinite(plain):
        raise ValueError(f"{name} has the scale {plain}; give a finite number, such as 1")
    return plain


def _changed(name: str, stored: StoredWeight, file: Path, changes: Sequence[Change]) -> Array:
    """Return a stored weight with changes, as it is stored."""
    parameter = _adapted(name, stored, file, changes)
    try:
        return stored.stored(parameter)
    except ValueError as error:
        adapter = changes[-1].adapter.file.name
        raise RequestError("adapters", f"{adapter}: {name}: {error}") from error


def _adapted(
    name: str, stored: StoredWeight, file: Path, changes: Sequence[Change]
) -> Float32Array:
    """Return a stored weight with changes, as the network has it."""
    parameter = np.array(stored.read(file))
    if parameter.ndim == _SCALE_AXES:  # of a norm, with axes of length 1 for height and width
        parameter = parameter.reshape(-1)
    adapter = ""
    try:
        for change in changes:
            adapter = change.adapter.file.name
            change.apply(parameter)
    except ValueError as error:
        raise RequestError("adapters", f"{adapter}: {name}: {error}") from error
    return parameter
