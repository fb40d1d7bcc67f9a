"""Names of an autoencoder's tensors in diffusers, and in the checkpoints of CompVis.

Sources: `AutoencoderKL` of diffusers 0.42.1, and ldm/modules/diffusionmodules/model.py in
CompVis/stable-diffusion (21f890f9). The second numbers the levels of the decoder from the highest
resolution, the first from the lowest.
"""

import re
from collections.abc import Iterable

from ldm_export.families.records import VAE_ATTENTION

#: Beginning of the autoencoder's names in a single file.
AUTOENCODER_PREFIX = "first_stage_model."

_LEVEL = re.compile(r"decoder\.up_blocks\.(\d+)\.")
_SPELLINGS = (
    (r"^(en|de)coder\.conv_norm_out\.", r"\1coder.norm_out."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.attentions\.", r".down.\1.attn."),
    (r"\.up\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.up\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.up\.(\d+)\.attentions\.", r".up.\1.attn."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")
_UNKNOWN = re.compile(r"(down|up|mid)_blocks?\.|\.(down|up)\.\d+\.(resnets|attentions|\w+samplers)")


def autoencoder_names(names: Iterable[str]) -> dict[str, str | None]:
    """Return the name in a single file of every tensor of an autoencoder, None of unknown ones.

    Args:
        names: All of the autoencoder's, as diffusers has them, or as CompVis does, with
            `AUTOENCODER_PREFIX` or without.
    """
    known = {name: name.removeprefix(AUTOENCODER_PREFIX) for name in names}
    levels = [int(match[1]) for name in known.values() if (match := _LEVEL.match(name))]
    deepest = max(levels, default=0)
    return {name: _single_file_name(rest, deepest) for name, rest in known.items()}


def _single_file_name(name: str, deepest: int) -> str | None:
    if not name.startswith(_PARTS):
        return None
    name = _LEVEL.sub(lambda match: f"decoder.up.{deepest - int(match[1])}.", name)
    for theirs, ours in (*_SPELLINGS, *VAE_ATTENTION):
        name = re.sub(theirs, ours, name)
    return None if _UNKNOWN.search(name) else AUTOENCODER_PREFIX + name
