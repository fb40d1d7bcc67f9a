"""Rows of the family table: latent consistency models, whose UNet takes the guidance scale.

Every row is that of the model they are distilled from, and the projection of the scale's features.
Models that a LoRA made into one (LCM-LoRA) have no such tensor, and are what they are merged with.

Source: Luo et al. 2023 (arXiv:2310.04378); steps and guidance scale are the defaults of
`LatentConsistencyModelPipeline` in diffusers.
"""

from dataclasses import replace
from types import MappingProxyType

from ldm_export.families.distilled import DISTILLED_FAMILIES
from ldm_export.families.records import Family
from ldm_export.families.stable_diffusion import SD_FAMILIES

_ORIGINALS = {family.name: family for family in (*SD_FAMILIES, *DISTILLED_FAMILIES)}


def _latent_consistency(original: str) -> Family:
    row = _ORIGINALS[original]
    assert row.family_defaults is not None, "an original model is exported"
    return replace(
        row,
        name=f"{original}-lcm",
        features=MappingProxyType({**row.features, "guidance": "embedded"}),
        family_defaults=replace(
            row.family_defaults,
            sampler="lcm",
            schedule="consistency",
            num_inference_steps=4,
            guidance_scale=8.5,
            eta=1.0,
        ),
    )


LATENT_CONSISTENCY_FAMILIES: tuple[Family, ...] = tuple(
    _latent_consistency(original)
    for original in ("stable-diffusion-1", "stable-diffusion-xl", "ssd-1b")
)
