"""Conditioning of the UNet, by task: context, channels concatenated to the latents, or nothing.

Each module has one kind of conditioning; `CONDITIONERS` maps every task to its kind.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from ldm_runtime.conditioning.class_labels import encode_class_label
from ldm_runtime.conditioning.contract import Conditioner, Conditioning, OpenNetwork
from ldm_runtime.conditioning.depth import encode_text_and_depth
from ldm_runtime.conditioning.embedded_guidance import embed_guidance
from ldm_runtime.conditioning.image_embedding import encode_text_and_image_embedding
from ldm_runtime.conditioning.images import (
    encode_low_resolution,
    encode_masked_image,
    encode_text_and_image,
    encode_text_and_low_resolution,
    encode_text_and_masked_image,
)
from ldm_runtime.conditioning.layout import encode_layout
from ldm_runtime.conditioning.micro_conditioning import with_micro_conditioning
from ldm_runtime.conditioning.retrieval import encode_embeddings
from ldm_runtime.conditioning.semantic import encode_segmentation
from ldm_runtime.conditioning.text import (
    MAX_CHUNKS,
    encode_text,
    most_chunks,
    open_tokenizer,
    used_inversions,
)
from ldm_runtime.requests.resolved import ResolvedRequest
from ldm_runtime.specs.model import ModelSpec, Task, components_of
from ldm_runtime.text import Tokenizer

__all__ = [
    "CONDITIONERS",
    "MAX_CHUNKS",
    "Conditioner",
    "Conditioning",
    "OpenNetwork",
    "conditioning_components",
    "encode_conditioning",
    "most_chunks",
    "open_tokenizer",
    "used_inversions",
    "with_micro_conditioning",
]

_NO_CONDITIONING = Conditioner(lambda *_: Conditioning())

#: The conditioner of every task, which turns its requests into conditioning.
CONDITIONERS: Mapping[Task, Conditioner] = MappingProxyType(
    {
        "unconditional": _NO_CONDITIONING,
        "class-to-image": Conditioner(encode_class_label),
        "text-to-image": Conditioner(encode_text),
        "layout-to-image": Conditioner(encode_layout),
        "semantic-synthesis": Conditioner(encode_segmentation),
        "super-resolution": Conditioner(encode_low_resolution),
        "text-super-resolution": Conditioner(encode_text_and_low_resolution),
        "inpainting": Conditioner(encode_masked_image, ("vae_encoder",)),
        "text-inpainting": Conditioner(encode_text_and_masked_image, ("vae_encoder",)),
        "image-editing": Conditioner(encode_text_and_image, ("vae_encoder",)),
        "image-variation": Conditioner(encode_text_and_image_embedding),
        "depth-to-image": Conditioner(encode_text_and_depth),
        "retrieval": Conditioner(encode_embeddings),
        "autoencoder": _NO_CONDITIONING,
    }
)


def conditioning_components(spec: ModelSpec) -> tuple[str, ...]:
    """Return the names of the networks that `encode_conditioning` needs."""
    conditioners = [
        name for name, component in components_of(spec).items() if component.role == "conditioner"
    ]
    return (*conditioners, *CONDITIONERS[spec.task].others)


def encode_conditioning(
    network: OpenNetwork,
    tokenizer: Tokenizer | None,
    request: ResolvedRequest,
    spec: ModelSpec,
) -> Conditioning:
    """Return the conditioning that all images of a request share.

    Args:
        network: Returns the networks of `conditioning_components` by name.
        tokenizer: From `open_tokenizer`; None for tasks without prompts.
        request: A resolved request.
        spec: The model.

    Raises:
        RequestError: The model cannot take the conditions of the request.
    """
    conditioning = CONDITIONERS[spec.task].encode(network, tokenizer, request, spec)
    guidance = embed_guidance(request, spec)
    return conditioning.changed(lambda each: replace(each, guidance=guidance))
