"""Rows of the family table: Stable Diffusion distilled into UNets with fewer blocks.

Every row is that of the original model and the blocks that are left: the transformer depth after
each residual block of both halves, and the middle. They are compared one by one, so that a file
that lost some of its tensors is not taken for a smaller model.

Sources: Kim et al. 2023 (arXiv:2305.15798) and Nota-NetsPresso/BK-SDM (e13670c); Gupta et al. 2024
(arXiv:2401.02677) and segmind/SSD-1B (e7fd132); Lee et al. 2023 (arXiv:2312.04005), whose blocks
are those of `KOALA_700M` and `KOALA_1B` in `comfy/supported_models.py` of ComfyUI; Song et al. 2024
(arXiv:2403.16627) and the list of models of leejet/stable-diffusion.cpp (97d2990).
"""

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ldm_export.families.records import Family
from ldm_export.families.stable_diffusion import SD_FAMILIES

_ORIGINALS = {family.name: family for family in SD_FAMILIES}


def _distilled(
    name: str,
    original: str,
    depths: Sequence[int],
    middle: str,
    outputs: Sequence[int] = (),
    *,
    blocks: int = 1,
    **settings: Any,  # noqa: ANN401  (`replace` checks their names)
) -> Family:
    """Return the row of a distilled model.

    Args:
        name: Its name.
        original: Name of the row of the model whose blocks it has.
        depths: Transformer depth of each level.
        middle: Contents of the middle block, see `detection.fingerprint`.
        outputs: Transformer depth of each residual block on the way up, in running order; of every
            level as on the way down unless given.
        blocks: Residual blocks per level on the way down.
        settings: Family defaults in which it differs.
    """
    row = _ORIGINALS[original]
    assert row.family_defaults is not None, "an original model is exported"
    mirrored = [depth for depth in reversed(depths) for _ in range(blocks + 1)]
    blocks_left = {
        "input_depths": _listed([depth for depth in depths for _ in range(blocks)]),
        "middle": middle,
        "output_depths": _listed(outputs or mirrored),
    }
    return replace(
        row,
        name=name,
        features=MappingProxyType({**row.features, **blocks_left}),
        family_defaults=replace(row.family_defaults, blocks_removed=True, **settings),
    )


def _listed(depths: Sequence[int]) -> str:
    return " ".join(map(str, depths))


_SD_1, _SD_2, _SDXL = "stable-diffusion-1", "stable-diffusion-2", "stable-diffusion-xl"
#: BK-SDM 2 is distilled from version 2.1 at 512 pixels.
_NOISE_AT_512: dict[str, Any] = {
    "prediction_type": "epsilon",
    "latent_size": 64,
    "siblings": MappingProxyType({}),
}
#: The timestep 999 alone, as of `DEISMultistepScheduler`, with which the model was released.
_ONE_STEP: dict[str, Any] = {
    "sampler": "deis",
    "schedule": "sgm_uniform",
    "num_inference_steps": 1,
    "guidance_scale": 1.0,
}

DISTILLED_FAMILIES: tuple[Family, ...] = (
    _distilled("bk-sdm-base", _SD_1, (1, 1, 1, 0), "attention"),
    _distilled("bk-sdm-small", _SD_1, (1, 1, 1, 0), "none"),
    _distilled("bk-sdm-tiny", _SD_1, (1, 1, 1), "none"),
    _distilled("bk-sdm-v2-base", _SD_2, (1, 1, 1, 0), "attention", **_NOISE_AT_512),
    _distilled("bk-sdm-v2-small", _SD_2, (1, 1, 1, 0), "none", **_NOISE_AT_512),
    _distilled("bk-sdm-v2-tiny", _SD_2, (1, 1, 1), "none", **_NOISE_AT_512),
    _distilled("sdxs-512", _SD_1, (0, 1, 1), "none", **_ONE_STEP),
    _distilled(
        "ssd-1b", _SDXL, (0, 2, 4), "residual block", (4, 4, 10, 2, 1, 1, 0, 0, 0), blocks=2
    ),
    _distilled("segmind-vega", _SDXL, (0, 1, 2), "residual block", blocks=2),
    _distilled("koala-700m", _SDXL, (0, 2, 5), "none"),
    _distilled("koala-1b", _SDXL, (0, 2, 6), "attention"),
)
