"""The facts that tell families of checkpoints apart, each with the tensor that shows it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

UNET_PREFIX = "model.diffusion_model."
NONE = "none"


class CheckpointTensor(Protocol):
    """What is asked of a tensor; its values are read only when `numpy` is called."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of every axis."""
        ...

    @property
    def dtype(self) -> str:
        """Element type as stored, such as "float16"."""
        ...

    def numpy(self) -> npt.NDArray[Any]:
        """Return the values."""
        ...


Tensors = Mapping[str, CheckpointTensor]


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One fact about a checkpoint.

    Attributes:
        value: What was found; "none" where there is no such thing.
        tensor: Name of the tensor that shows it, or "" if it shows by absence.
    """

    value: int | str
    tensor: str


#: Tensors that give a kind of first stage or conditioner away; the first that is present decides.
FIRST_STAGES = (
    ("vq", "first_stage_model.quantize.embedding.weight"),
    ("kl", "first_stage_model.post_quant_conv.weight"),
)
TEXT_ENCODERS = (
    ("clip", "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"),
    ("clip", "cond_stage_model.transformer.embeddings.token_embedding.weight"),
    ("openclip", "cond_stage_model.model.ln_final.weight"),
    ("bert", "cond_stage_model.transformer.token_emb.weight"),
    ("class embedding", "cond_stage_model.embedding.weight"),
    ("spatial rescaler", "cond_stage_model.channel_mapper.weight"),
    (
        "clip + openclip",
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
    ),
    ("openclip (sgm)", "conditioner.embedders.0.model.ln_final.weight"),
)
VECTORS = (
    ("mlp", f"{UNET_PREFIX}label_emb.0.0.weight"),
    ("embedding", f"{UNET_PREFIX}label_emb.weight"),
)
EXTRAS = (
    ("depth estimator", "depth_model."),
    ("image embedder", "embedder.model."),
    ("low-resolution image", "low_scale_model."),
    ("control network", "control_model."),
)
#: Endings of UNet tensors that give the kind of attention away.
ATTENTIONS = (("transformer", ".attn1.to_q.weight"), ("qkv", ".qkv.weight"))


def fingerprint(tensors: Tensors) -> Mapping[str, Fact]:
    """Return what is known about a checkpoint from names and shapes alone, by name of the fact."""
    unet = {name: tensors[name].shape for name in tensors if name.startswith(UNET_PREFIX)}
    model_channels = _size(unet, f"{UNET_PREFIX}input_blocks.0.0.weight", axis=0)
    in_channels = _size(unet, f"{UNET_PREFIX}input_blocks.0.0.weight", axis=1)
    out_channels = _size(unet, f"{UNET_PREFIX}out.2.weight", axis=0)
    vector = _present(tensors, VECTORS)
    return {
        "model_channels": model_channels,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "conditioning_channels": _difference(in_channels, out_channels),
        "context_dim": _size(unet, _ending(unet, ".attn2.to_k.weight"), axis=1),
        "attention": _attention(unet),
        "projection": _projection(unet),
        "vector": vector,
        "vector_width": _size(unet, vector.tensor, axis=1),
        "first_stage": _present(tensors, FIRST_STAGES),
        "text_encoder": _present(tensors, TEXT_ENCODERS),
        "extra": _extra(tensors),
    }


def prefixes(names: Iterable[str]) -> Mapping[str, int]:
    """Return how many of `names` match "first part.*", or are it, the most frequent first."""
    counts: dict[str, int] = {}
    for name in names:
        first, dot, _ = name.partition(".")
        prefix = f"{first}.*" if dot else name
        counts[prefix] = counts.get(prefix, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def expected_tensor(fact: str, value: int | str) -> str:
    """Return the tensor that would show that `fact` is `value`, or "" if there is no one tensor."""
    tables = {"first_stage": FIRST_STAGES, "text_encoder": TEXT_ENCODERS, "vector": VECTORS}
    return next((tensor for kind, tensor in tables.get(fact, ()) if kind == value), "")


def _present(tensors: Tensors, kinds: Iterable[tuple[str, str]]) -> Fact:
    for kind, tensor in kinds:
        if tensor in tensors:
            return Fact(value=kind, tensor=tensor)
    return Fact(value=NONE, tensor="")


def _size(shapes: Mapping[str, tuple[int, ...]], tensor: str, axis: int) -> Fact:
    shape = shapes.get(tensor, ())
    if axis >= len(shape):
        return Fact(value=NONE, tensor="")
    return Fact(value=shape[axis], tensor=tensor)


def _difference(whole: Fact, part: Fact) -> Fact:
    if isinstance(whole.value, int) and isinstance(part.value, int):
        return Fact(value=whole.value - part.value, tensor=whole.tensor)
    return Fact(value=NONE, tensor="")


def _ending(names: Iterable[str], ending: str) -> str:
    return next((name for name in names if name.endswith(ending)), "")


def _attention(unet: Iterable[str]) -> Fact:
    names = list(unet)
    for kind, ending in ATTENTIONS:
        if tensor := _ending(names, ending):
            return Fact(value=kind, tensor=tensor)
    return Fact(value=NONE, tensor="")


def _projection(unet: Mapping[str, tuple[int, ...]]) -> Fact:
    kinds = {2: "linear", 4: "convolution"}
    for name in unet:
        # An AttentionBlock has a proj_out only, so proj_in is a transformer's.
        if name.endswith(".proj_in.weight"):
            return Fact(value=kinds.get(len(unet[name]), NONE), tensor=name)
    return Fact(value=NONE, tensor="")


def _extra(tensors: Tensors) -> Fact:
    for kind, prefix in EXTRAS:
        tensor = next((name for name in tensors if name.startswith(prefix)), "")
        if tensor:
            return Fact(value=kind, tensor=tensor)
    return Fact(value=NONE, tensor="")
