"""The layers of an adapter: the tensors of each, and the weights that they change.

Sources: `lycoris.modules` of LyCORIS 4.1, `peft.tuners.lora` of PEFT 0.21; rank-stabilised LoRA:
Kalajdzievski 2023 (arXiv:2312.03732).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ldm_runtime.adapters.changes import KINDS, Float32Array, Kind, Shape, decomposed, fitted
from ldm_runtime.tensor_files.lazy_tensors import LazyTensor
from ldm_runtime.tensor_files.tensor_extent import FLOATS

_ALPHA = "alpha"
_MAGNITUDES = frozenset({"dora_scale", "lora_magnitude_vector"})
_BIASES = frozenset({"diff_b", "b_norm"})


@dataclass(frozen=True, kw_only=True)
class AdapterLayer:
    """One layer of an adapter, whose tensors stay in the file until it is applied.

    Attributes:
        name: Its name in the file, for messages.
        tensors: Its tensors by the names that kohya's and LyCORIS' files have for them, without
            ".weight": "lora_down", "lora_up", "alpha", "hada_w1_a", "diff", "dora_scale", …
        header_alpha: Alpha that the file's header states; a tensor "alpha" comes first, and without
            both alpha is the rank.
        rank_stabilised: Whether the header's alpha is divided by the root of the rank.

    Raises:
        ValueError: The tensors are not those of a known kind of layer, or one is missing.
    """

    name: str
    tensors: Mapping[str, LazyTensor]
    header_alpha: float | None = None
    rank_stabilised: bool = False

    def __post_init__(self) -> None:
        _check_names(self)
        _check_types(self)
        _check_rank(self)

    @property
    def kind(self) -> str:
        """What it is, such as "LoRA", "LoKr with DoRA" or "full difference"."""
        kind = self._kind
        if kind is None:
            return "difference of a bias"
        return f"{kind.name} with DoRA" if self._magnitude else kind.name

    @property
    def rank(self) -> int | None:
        """Its rank, None of a full difference."""
        names = self._kind.rank_of if self._kind else ()
        return next((self.tensors[name].shape[0] for name in names if name in self.tensors), None)

    @property
    def changes_weight(self) -> bool:
        """Whether it changes the weight of its layer."""
        return self._kind is not None

    @property
    def changes_bias(self) -> bool:
        """Whether it changes the bias of its layer."""
        return not _BIASES.isdisjoint(self.tensors)

    def adapted(self, weight: Float32Array, scale: float) -> Float32Array:
        """Return a weight with the change of this layer.

        With DoRA, the scale goes from the weight (0) to the decomposed one (1), as in
        `apply_dora_scale` of LyCORIS.

        Args:
            weight: (out, in), (out, in, height, width), or (n,) of a norm.
            scale: How much of the change to make; 1 is what was trained.

        Returns:
            A new array of the same shape.

        Raises:
            ValueError: The tensors do not fit the weight or are not finite, or the layer changes
                a bias alone.
        """
        kind = self._kind
        if kind is None:
            raise ValueError(f"layer {self.name!r} changes a bias alone; apply it to the bias")
        values = {name: self._value(name) for name in self.tensors if name != _ALPHA}
        with np.errstate(over="ignore", invalid="ignore"):
            try:
                change = kind.change(values, weight.shape)
                changed = weight + self._strength() * change
                if self._magnitude:
                    changed = decomposed(changed, self._magnitude, values[self._magnitude])
            except ValueError as error:
                raise self._misfit(weight.shape) from error
            return self._finite(_towards(weight, changed, scale))

    def factors(self) -> tuple[Float32Array, Float32Array] | None:
        """Return the two matrices whose product changes the weight; None if it is not so simple.

        Only a LoRA is, that has no third matrix and no magnitudes, changes no bias, and whose first
        matrix sees one pixel.

        Returns:
            down (rank, in) and up (out, rank), which has the factor of the change.

        Raises:
            ValueError: They are not finite.
        """
        kind, down = self._kind, self.tensors.get("lora_down")
        if kind is None or down is None or "lora_mid" in self.tensors:
            return None
        if self._magnitude or self.changes_bias or math.prod(down.shape[2:]) != 1:
            return None
        lower, upper = (
            self._value(name).reshape(self.tensors[name].shape[0], -1)
            for name in ("lora_down", "lora_up")
        )
        with np.errstate(over="ignore", invalid="ignore"):
            return self._finite(lower), self._finite(self._strength() * upper)

    def adapted_bias(self, bias: Float32Array, scale: float) -> Float32Array:
        """Return a bias (n,) with the change of this layer, a new array.

        Raises:
            ValueError: The layer changes no bias, or its tensor does not fit or is not finite.
        """
        names = [name for name in self.tensors if name in _BIASES]
        if not names:
            raise ValueError(f"layer {self.name!r} changes no bias; leave the bias as it is")
        change = self._value(names[0])
        with np.errstate(over="ignore", invalid="ignore"):
            try:
                changed = bias + fitted(change, bias.shape)
            except ValueError as error:
                raise self._misfit(bias.shape) from error
            return self._finite(_towards(bias, changed, scale))

    @property
    def _kind(self) -> Kind | None:
        """The row of the table, None where only a bias changes."""
        parts = _parts(self.tensors)
        return next((kind for kind in KINDS if parts in kind.complete), None)

    @property
    def _magnitude(self) -> str | None:
        """The tensor of DoRA's magnitudes."""
        return next((name for name in self.tensors if name in _MAGNITUDES), None)

    def _value(self, name: str) -> Float32Array:
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite
            return self.tensors[name].numpy().astype(np.float32)

    def _strength(self) -> float:
        """Return the factor of the change before any scale."""
        rank = self.rank
        if rank is None:
            return 1.0
        if _ALPHA in self.tensors:
            # LyCORIS and kohya: an alpha of 0 is none.
            return (float(self.tensors[_ALPHA].numpy().reshape(-1)[0]) or rank) / rank
        alpha = rank if self.header_alpha is None else self.header_alpha
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def _finite(self, result: Float32Array) -> Float32Array:
        if not np.isfinite(result).all():
            raise ValueError(
                f"layer {self.name!r} makes numbers that are not finite; its training failed, or "
                "the scale is too large"
            )
        return result

    def _misfit(self, shape: Shape) -> ValueError:
        shapes = ", ".join(
            f"{name} {_shown(tensor.shape)}"
            for name, tensor in self.tensors.items()
            if name != _ALPHA
        )
        return ValueError(
            f"layer {self.name!r} ({self.kind}) has {shapes}, which does not fit a weight of shape "
            f"{_shown(shape)}; give an adapter for this model"
        )


def _parts(names: Iterable[str]) -> frozenset[str]:
    """Return the tensors that the change of a weight is made of."""
    return frozenset(names) - _BIASES - _MAGNITUDES - {_ALPHA}


def _check_names(layer: AdapterLayer) -> None:
    """Check that the tensors make up a layer."""
    parts, names = _parts(layer.tensors), frozenset(layer.tensors)
    known = [kind for kind in KINDS if parts in kind.complete]
    if not (known or (not parts and names & _BIASES)) or len(names & _BIASES) > 1:
        raise ValueError(
            f"layer {layer.name!r} has {_listed(names)}{_missing(parts)}; get the file again, or "
            "save it again with the program that trained it"
        )
    if (magnitudes := names & _MAGNITUDES) and (
        len(magnitudes) > 1 or not (known and known[0].decomposes)
    ):
        raise ValueError(
            f"layer {layer.name!r} has {_listed(names)}, and DoRA is one magnitude on top of LoRA, "
            "LoHa or LoKr; save it again with the program that trained it"
        )


def _missing(parts: frozenset[str]) -> str:
    """Return what is wrong with the tensors of a layer, as the end of a clause."""
    sets = [each - parts for kind in KINDS for each in kind.complete if parts and parts <= each]
    if lacking := min(sets, key=len, default=None):
        return f" without {_listed(lacking)}"
    return ", which is not a known kind of layer"


def _check_types(layer: AdapterLayer) -> None:
    """Check that the tensors are floating-point numbers, and alpha is one finite number."""
    for name, tensor in layer.tensors.items():
        if name == _ALPHA:
            _check_alpha(layer.name, tensor)
        elif tensor.dtype not in FLOATS:
            raise ValueError(
                f"layer {layer.name!r} has {name} of type {tensor.dtype}; save the adapter in "
                "float16, bfloat16 or float32"
            )


def _check_alpha(layer: str, tensor: LazyTensor) -> None:
    values = tensor.numpy() if math.prod(tensor.shape) == 1 else None
    if values is None or values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise ValueError(
            f"layer {layer!r} has an alpha of type {tensor.dtype} and shape "
            f"{_shown(tensor.shape)} that is not one finite number; get the file again"
        )


def _check_rank(layer: AdapterLayer) -> None:
    """Check that tensors with a rank have one above 0."""
    if empty := [name for name, each in layer.tensors.items() if 0 in each.shape]:
        shape = _shown(layer.tensors[empty[0]].shape)
        raise ValueError(
            f"layer {layer.name!r} has {empty[0]} of shape {shape}, a rank of 0; get the file again"
        )
    if scalars := [name for name in _parts(layer.tensors) if not layer.tensors[name].shape]:
        raise ValueError(
            f"layer {layer.name!r} has {scalars[0]} that is a single number; get the file again"
        )


def _towards(weight: Float32Array, changed: Float32Array, scale: float) -> Float32Array:
    """Return a new array that is `scale` of the way from one to the other."""
    return (weight + scale * (changed - weight)).astype(np.float32, copy=False)


def _listed(names: frozenset[str]) -> str:
    return " and ".join(sorted(names)) or "no tensors"


def _shown(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "()"
