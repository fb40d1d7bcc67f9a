"""The changes of weights that adapters hold: every kind is a row of a table and a function.

A function maps the tensors of a layer, in float32, to a change of the weight's shape, before any
strength. Weights have torch's layout: (out, in), (out, in, height, width) or (n,). All raise a bare
`ValueError` where shapes do not fit; the layer, which knows its name, says it in a sentence.

Sources: `lycoris.functional` of LyCORIS 4.1; LoRA: Hu et al. 2021 (arXiv:2106.09685); LoHa:
Hyeon-Woo et al. 2021 (arXiv:2108.06098); LoKr: Yeh et al. 2023 (arXiv:2309.14859); DoRA: Liu et al.
2024 (arXiv:2402.09353).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Shape = tuple[int, ...]
Values = Mapping[str, Float32Array]

#: Added to the norms that DoRA divides by, as LyCORIS does.
_EPSILON = float(np.finfo(np.float32).eps)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of layer.

    Attributes:
        name: Its name.
        complete: The sets of tensors that such a layer may consist of.
        change: The change of a weight of a shape before any strength, or a `ValueError`.
        rank_of: Tensors whose first axis is the rank; without any of them, alpha means nothing.
        decomposes: Whether DoRA may be on top of it.
    """

    name: str
    complete: tuple[frozenset[str], ...]
    change: Callable[[Values, Shape], Float32Array]
    rank_of: tuple[str, ...] = ()
    decomposes: bool = True


def decomposed(changed: Float32Array, name: str, magnitude: Float32Array) -> Float32Array:
    """Return a weight of which every output, or else every input, has a given norm.

    PEFT's magnitudes are of outputs; in LyCORIS' the shape tells, which older versions had along
    the inputs.
    """
    shape = changed.shape
    outputs = (shape[0], *(1 for _ in shape[1:]))
    inputs = (1, *shape[1:2], *(1 for _ in shape[2:]))
    if name == "lora_magnitude_vector" or _trimmed(magnitude.shape) == _trimmed(outputs):
        axis, wanted = 0, magnitude.reshape(outputs)
    elif _trimmed(magnitude.shape) == _trimmed(inputs):
        axis, wanted = 1, magnitude.reshape(inputs)
    else:
        raise ValueError(f"{magnitude.shape} is neither {outputs} nor {inputs}")
    others = tuple(each for each in range(len(shape)) if each != axis)
    norms: Float32Array = np.sqrt(np.square(changed).sum(axis=others, keepdims=True))
    result: Float32Array = changed * (wanted / (norms + _EPSILON))
    return result


def fitted(change: Float32Array, shape: Shape) -> Float32Array:
    """Return a change in the shape of its weight."""
    _check_fit(change.shape, shape)
    return change.reshape(shape)


def _lora(values: Values, shape: Shape) -> Float32Array:
    """Return up·down; where there is a core, the convolutions of all three after one another."""
    up, down, core = values["lora_up"], values["lora_down"], values.get("lora_mid")
    if core is not None:
        return _tucker(core, _matrix(up), _matrix(down), shape)
    return _fitted_product(_matrix(up), down, shape)


def _loha(values: Values, shape: Shape) -> Float32Array:
    """Return the elementwise product of two products of matrices."""
    change: Float32Array = _factor(values, "hada_w1", "hada_t1", shape)
    change *= _factor(values, "hada_w2", "hada_t2", shape)
    return change


def _factor(values: Values, name: str, core: str, shape: Shape) -> Float32Array:
    """Return a·b, or core ×₁ aᵀ ×₂ b."""
    left, right = _matrix(values[f"{name}_a"]), values[f"{name}_b"]
    if core in values:
        return _tucker(values[core], left.T, _matrix(right), shape)
    return _fitted_product(left, right, shape)


def _lokr(values: Values, shape: Shape) -> Float32Array:
    """Return the Kronecker product of two matrices; the second has the kernel."""
    first, second = _lokr_shape(values, "lokr_w1"), _lokr_shape(values, "lokr_w2")
    if len(first) != 2:
        raise ValueError("the first factor is not a matrix")
    whole = (first[0] * second[0], first[1] * second[1], *second[2:])
    _check_fit(whole, shape)
    left = _lokr_factor(values, "lokr_w1", first)
    right = _lokr_factor(values, "lokr_w2", second)
    return np.kron(left, _matrix(right)).reshape(shape)


def _lokr_shape(values: Values, name: str) -> Shape:
    """Return the shape of a factor, of which nothing is computed yet."""
    if name in values:
        return _at_least_two_axes(values[name]).shape
    left, right = _matrix(values[f"{name}_a"]), _at_least_two_axes(values[f"{name}_b"])
    core = _core_of(values, name)
    if core is not None:
        return (left.shape[1], right.shape[1], *core.shape[2:])
    return (left.shape[0], *right.shape[1:])


def _lokr_factor(values: Values, name: str, shape: Shape) -> Float32Array:
    if name in values:
        return values[name]
    return _factor(values, name, name.replace("w", "t"), shape)


def _core_of(values: Values, name: str) -> Float32Array | None:
    core = values.get(name.replace("w", "t"))
    return None if core is None else _at_least_two_axes(core)


def _difference(values: Values, shape: Shape) -> Float32Array:
    """Return the one tensor that is the whole change."""
    change = values["diff"] if "diff" in values else values["w_norm"]
    return fitted(change, shape)


def _tucker(core: Float32Array, up: Float32Array, down: Float32Array, shape: Shape) -> Float32Array:
    """Return core (r, s, …) ×₁ up (out, r) ×₂ down (s, in), of shape (out, in, …)."""
    _at_least_two_axes(core)
    _check_fit((up.shape[0], down.shape[1], *core.shape[2:]), shape)
    half = np.tensordot(up, core, axes=(1, 0))
    return np.moveaxis(np.tensordot(half, down, axes=(1, 0)), -1, 1).reshape(shape)


def _fitted_product(left: Float32Array, right: Float32Array, shape: Shape) -> Float32Array:
    """Return left (out, r) · right (r, in, …)."""
    _check_fit((left.shape[0], *right.shape[1:]), shape)
    return (left @ _matrix(right)).reshape(shape)


def _check_fit(change: Shape, shape: Shape) -> None:
    """Check that a change is of a weight: lengths of 1 may be missing, the kernel be flattened."""
    flat = (*shape[:1], math.prod(shape[1:]))
    if _trimmed(change) not in {_trimmed(shape), _trimmed(flat)}:
        raise ValueError(f"{change} is not {shape}")


def _trimmed(shape: Shape) -> Shape:
    """Return a shape without the lengths of 1 at its end."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _matrix(array: Float32Array) -> Float32Array:
    """Return an array with all axes but the first as one."""
    return _at_least_two_axes(array).reshape(array.shape[0], -1)


def _at_least_two_axes(array: Float32Array) -> Float32Array:
    if array.ndim < 2:
        raise ValueError("a factor is not a matrix")
    return array


_PAIRS = {name: frozenset({f"{name}_a", f"{name}_b"}) for name in ("lokr_w1", "lokr_w2")}
_HADAMARD = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
#: Every kind of layer that is read.
KINDS: tuple[Kind, ...] = (
    Kind(
        name="LoRA",
        complete=(
            frozenset({"lora_down", "lora_up"}),
            frozenset({"lora_down", "lora_up", "lora_mid"}),
        ),
        change=_lora,
        rank_of=("lora_down",),
    ),
    Kind(
        name="LoHa",
        complete=(_HADAMARD, _HADAMARD | {"hada_t1", "hada_t2"}),
        change=_loha,
        rank_of=("hada_w1_b",),
    ),
    Kind(
        name="LoKr",
        complete=tuple(
            first | second
            for first, second in product(
                (frozenset({"lokr_w1"}), _PAIRS["lokr_w1"]),
                (frozenset({"lokr_w2"}), _PAIRS["lokr_w2"], _PAIRS["lokr_w2"] | {"lokr_t2"}),
            )
        ),
        change=_lokr,
        rank_of=("lokr_w1_b", "lokr_w2_b"),
    ),
    Kind(
        name="full difference",
        complete=(frozenset({"diff"}), frozenset({"w_norm"})),
        change=_difference,
        decomposes=False,
    ),
)
