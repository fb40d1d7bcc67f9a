"""CLIP's image encoders and statistics of embeddings, as a single file has them.

Sources: `CLIPVisionModelWithProjection` of transformers 4 and 5, `StableUnCLIPImageNormalizer` of
diffusers 0.42.1, and src/open_clip/transformer.py in mlfoundations/open_clip (89fb801).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ldm_export.checkpoint.stored_tensors import StoredTensor
from ldm_export.families.records import IMAGE_ENCODER_PREFIX, NOISE_AUGMENTOR_PREFIX
from ldm_export.intake.component import StoredComponent
from ldm_export.intake.renaming import renamed
from ldm_export.intake.statements import image_encoder_fields
from ldm_export.intake.text_encoder_names import openclip_tensors

_VISION_MODEL = "vision_model."
_POSITIONS = "embeddings.position_ids"
_OUTSIDE: Mapping[str, str] = MappingProxyType(
    {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "pre_layrnorm.weight": "ln_pre.weight",  # spelt so by transformers
        "pre_layrnorm.bias": "ln_pre.bias",
        "post_layernorm.weight": "ln_post.weight",
        "post_layernorm.bias": "ln_post.bias",
    }
)
_STATISTICS: Mapping[str, str] = MappingProxyType(
    {
        "mean": f"{NOISE_AUGMENTOR_PREFIX}data_mean",
        "std": f"{NOISE_AUGMENTOR_PREFIX}data_std",
    }
)


def image_encoder_of(
    component: StoredComponent,
) -> tuple[Mapping[str, StoredTensor], dict[str, Any]]:
    """Return an image encoder under its names in a single file, and what its configuration states.

    Raises:
        CheckpointError: It has tensors that are not known, or is not one that is exported.
    """
    plain = {name.removeprefix(_VISION_MODEL): tensor for name, tensor in component.tensors.items()}
    plain.pop(_POSITIONS, None)
    tensors, unknown = openclip_tensors(plain, IMAGE_ENCODER_PREFIX, _OUTSIDE)
    renamed(component, "image encoder", dict.fromkeys(unknown))
    if component.config is None:
        return tensors, {}
    return tensors, image_encoder_fields(component.path / "config.json", component.config)


def image_normalizer_of(component: StoredComponent) -> dict[str, StoredTensor]:
    """Return the statistics of embeddings of images under the names that they would have in a file.

    Raises:
        CheckpointError: It has other tensors.
    """
    names = {name: _STATISTICS.get(name) for name in component.tensors}
    return renamed(component, "image normalizer", names)
