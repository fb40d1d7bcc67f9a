"""The networks of components, built without weights and filled strictly from a checkpoint."""

import mmap
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ldm_export.errors import WeightsError
from ldm_export.networks.autoencoder import LatentDecoder, LatentEncoder
from ldm_export.networks.bert import BertTextEncoder
from ldm_export.networks.clip import ClipTextEncoder
from ldm_export.networks.conditioners import ClassEmbedder, SpatialRescaler
from ldm_export.networks.depth_estimator import DepthEstimator
from ldm_export.networks.openclip import ClipImageEncoder, OpenClipTextEncoder
from ldm_export.networks.tiny_autoencoder import TinyDecoder
from ldm_export.networks.unet import ShallowUNet, UNet
from ldm_runtime.specs.components import COMPONENTS
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.networks import (
    AutoencoderSpec,
    ClassEmbedderSpec,
    DepthEstimatorSpec,
    ImageEncoderSpec,
    NetworkSpec,
    SegmentationEncoderSpec,
    TextEncoderSpec,
    UNetSpec,
)

_NAMED = 5  # how many tensors an error lists before it only counts


class Weight(Protocol):
    """A tensor of a checkpoint that has not been read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of its axes."""
        ...

    def numpy(self) -> npt.NDArray[np.generic]:
        """Return its values."""
        ...


#: The torch module of every kind of network that is one component, by the class of its record.
_MODULES: Mapping[type[NetworkSpec], Callable[[Any], nn.Module]] = MappingProxyType(
    {
        TextEncoderSpec: lambda record: _TEXT_ENCODERS[record.kind](record),
        ImageEncoderSpec: ClipImageEncoder,
        ClassEmbedderSpec: ClassEmbedder,
        SegmentationEncoderSpec: SpatialRescaler,
        DepthEstimatorSpec: DepthEstimator,
    }
)
_TEXT_ENCODERS: Mapping[str, Callable[[TextEncoderSpec], nn.Module]] = MappingProxyType(
    {"clip": ClipTextEncoder, "openclip": OpenClipTextEncoder, "bert": BertTextEncoder}
)
#: The modules of a UNet, by component: the whole, and its outermost blocks.
_UNETS: Mapping[str, Callable[[UNetSpec], nn.Module]] = MappingProxyType(
    {"unet": UNet, "unet_shallow": ShallowUNet}
)
#: The modules of an autoencoder's two halves, by role; of a tiny one, its decoder alone.
_HALVES: Mapping[str, Callable[[AutoencoderSpec], nn.Module]] = MappingProxyType(
    {"decoder": LatentDecoder, "encoder": LatentEncoder}
)
_TINY_HALVES: Mapping[str, Callable[[AutoencoderSpec], nn.Module]] = MappingProxyType(
    {"decoder": TinyDecoder}
)


def build_network(component: str, spec: ModelSpec) -> nn.Module:
    """Return the network of `component`, which the model has, on the meta device: no memory."""
    row = COMPONENTS[component]
    record = spec.networks[row.network]
    with torch.device("meta"):
        if isinstance(record, AutoencoderSpec):
            halves = _TINY_HALVES if record.kind == "tiny" else _HALVES
            network = halves[row.role](record)
        elif isinstance(record, UNetSpec):
            network = _UNETS[component](record)
        else:
            network = _MODULES[row.record](record)
    return network.eval().requires_grad_(False)


def parameter_names(component: str, spec: ModelSpec) -> frozenset[str]:
    """Return the names of all parameters of the network of `component`, which the model has."""
    return frozenset(name for name, _ in build_network(component, spec).named_parameters())


def check_weights(component: str, spec: ModelSpec, weights: Mapping[str, Weight]) -> None:
    """Check that a checkpoint has every weight of a component in its shape, and no other.

    Axes of length 1 at the end do not count: some tools store convolutions of one pixel as
    matrices. Reads no values, and is quick whatever the size.

    Raises:
        WeightsError: A parameter has no tensor, a tensor no parameter, or shapes differ.
    """
    _check_same(component, build_network(component, spec), weights)


def load_network(component: str, spec: ModelSpec, weights: Mapping[str, Weight]) -> nn.Module:
    """Return the network of `component` in float32 with a checkpoint's weights.

    Args:
        component: Name in `ldm_runtime.specs.components.COMPONENTS`.
        spec: The model.
        weights: The checkpoint's tensors by parameter name of the network.

    Raises:
        WeightsError: A parameter has no tensor, a tensor no parameter, shapes differ, or a value
            is not finite.
    """
    network = build_network(component, spec)
    _check_same(component, network, weights)
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    state = {
        name: _as_float32(component, name, weight).reshape(shapes[name])
        for name, weight in weights.items()
    }
    network.load_state_dict(state, strict=True, assign=True)
    return network.requires_grad_(False)


def restore_weights(component: str, network: nn.Module, weights: Mapping[str, Weight]) -> None:
    """Give a network of `load_network`, changed in place, a checkpoint's weights again.

    They are read one by one into the parameters that are there, so that no second copy of the
    network is in memory.

    Args:
        component: Its name.
        network: The network.
        weights: The tensors that it was loaded from.

    Raises:
        WeightsError: A value is not finite.
    """
    for name, parameter in network.named_parameters():
        exact = _as_float32(component, name, weights[name])
        parameter.data.copy_(exact.reshape(parameter.shape))


def _as_float32(component: str, name: str, weight: Weight) -> torch.Tensor:
    stored = weight.numpy()
    tensor = torch.from_numpy(np.array(stored, dtype=np.float32, order="C"))
    _give_back(stored)
    lowest, highest = torch.aminmax(tensor)
    if not (lowest.isfinite() and highest.isfinite()):  # aminmax propagates NaN
        raise WeightsError(
            f"tensor {name} of the {component} has values that are not finite numbers; the "
            "training that made this checkpoint failed, take an earlier one"
        )
    return tensor


def _give_back(array: npt.NDArray[np.generic]) -> None:
    """Give back to the operating system the pages of a mapped file that `array` was read from.

    A checkpoint is read once, front to back; without this both it and the copy stay resident.
    """
    owner: object = array
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    if isinstance(owner, mmap.mmap):
        owner.madvise(mmap.MADV_DONTNEED)


def _check_same(component: str, network: nn.Module, weights: Mapping[str, Weight]) -> None:
    expected = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    faults = {
        "missing": [name for name in expected if name not in found],
        "not part of it": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} ({found[name]}, expected {shape})"
            for name, shape in expected.items()
            if name in found and _significant(found[name]) != _significant(shape)
        ],
    }
    sentences = [f"{kind}: {_listed(names)}" for kind, names in faults.items() if names]
    if faults["not part of it"]:
        sentences.append("--ignore '*NAME' leaves out what does not matter")
    if sentences:
        raise WeightsError(
            f"the checkpoint's weights do not fit the {component}; {'; '.join(sentences)}"
        )


def _significant(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without the axes of length 1 at its end."""
    return _significant(shape[:-1]) if shape and shape[-1] == 1 else shape


def _listed(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
