"""What each task feeds the UNet besides latents: context, channels behind the latents, or nothing.

A module has one kind of conditioning, and `KINDS` says which kind a task has.
"""

from collections.abc import Mapping
from types import MappingProxyType

from ldm_runtime.conditioning.class_labels import encode_class_label
from ldm_runtime.conditioning.contract import Conditioning, Kind, OpenNetwork
from ldm_runtime.conditioning.layout import encode_layout
from ldm_runtime.conditioning.pictures import encode_hole, encode_low_resolution
from ldm_runtime.conditioning.retrieval import encode_embeddings
from ldm_runtime.conditioning.semantic import encode_segmentation
from ldm_runtime.conditioning.text import MAX_CHUNKS, encode_text, open_tokenizer
from ldm_runtime.requests.resolved import ResolvedRequest
from ldm_runtime.specs.model import ModelSpec, Task, components_of
from ldm_runtime.text import Tokenizer

__all__ = [
    "KINDS",
    "MAX_CHUNKS",
    "Conditioning",
    "Kind",
    "OpenNetwork",
    "conditioning_components",
    "encode_conditioning",
    "open_tokenizer",
]

_NOTHING = Kind(lambda *_: Conditioning())

#: How the requests of every task become conditioning.
KINDS: Mapping[Task, Kind] = MappingProxyType(
    {
        "unconditional": _NOTHING,
        "class-to-image": Kind(encode_class_label),
        "text-to-image": Kind(encode_text),
        "layout-to-image": Kind(encode_layout),
        "semantic-synthesis": Kind(encode_segmentation),
        "super-resolution": Kind(encode_low_resolution),
        "inpainting": Kind(encode_hole, ("vae_encoder",)),
        "retrieval": Kind(encode_embeddings),
        "first-stage": _NOTHING,
    }
)


def conditioning_components(spec: ModelSpec) -> tuple[str, ...]:
    """Return the networks that `encode_conditioning` asks for, by name."""
    conditioners = [
        name for name, component in components_of(spec).items() if component.role == "conditioner"
    ]
    return (*conditioners, *KINDS[spec.task].others)


def encode_conditioning(
    network: OpenNetwork,
    tokenizer: Tokenizer | None,
    request: ResolvedRequest,
    spec: ModelSpec,
) -> Conditioning:
    """Return what conditions every image of a request.

    Args:
        network: Returns the networks of `conditioning_components` by name.
        tokenizer: From `open_tokenizer`; None for tasks without prompts.
        request: A resolved request.
        spec: The model.

    Raises:
        RequestError: The model cannot take what the request gives.
    """
    return KINDS[spec.task].encode(network, tokenizer, request, spec)
