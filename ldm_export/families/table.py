"""The table of checkpoint families: features of each, and defaults for what shapes cannot tell.

A family that is exported is a row with `family_defaults`; a row without is recognised by name, so
that its checkpoints get a clear refusal instead of a wrong export.
"""

from ldm_export.families.autoencoders import AUTOENCODER_FAMILIES
from ldm_export.families.distilled import DISTILLED_FAMILIES
from ldm_export.families.latent_consistency import LATENT_CONSISTENCY_FAMILIES
from ldm_export.families.latent_diffusion import LDM_FAMILIES
from ldm_export.families.records import Family
from ldm_export.families.stable_diffusion import SD_FAMILIES

FAMILIES: tuple[Family, ...] = (
    *SD_FAMILIES,
    *DISTILLED_FAMILIES,
    *LATENT_CONSISTENCY_FAMILIES,
    *LDM_FAMILIES,
    *AUTOENCODER_FAMILIES,
)
