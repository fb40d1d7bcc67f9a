"""diffusers' `AutoencoderKL` or `VQModel` for a first stage in the CompVis layout."""

from diffusers import AutoencoderKL, VQModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    update_vae_attentions_ldm_to_diffusers,
)


def load_first_stage(spec, state, scaling_factor=1.0):
    """Return the twin for a first stage's state dict, strictly loaded."""
    attends = [level in spec.attention_levels for level in range(len(spec.channel_mult))]
    config = {
        "in_channels": spec.image_channels,
        "out_channels": spec.image_channels,
        "block_out_channels": [mult * spec.channels for mult in spec.channel_mult],
        "layers_per_block": spec.num_res_blocks,
        "latent_channels": spec.z_channels,
        "down_block_types": [f"{'Attn' * each}DownEncoderBlock2D" for each in attends],
        "up_block_types": [f"{'Attn' * each}UpDecoderBlock2D" for each in attends[::-1]],
        "mid_block_add_attention": spec.middle_attention,
        "scaling_factor": scaling_factor,
    }
    if spec.kind == "vq":
        sizes = {"num_vq_embeddings": spec.codebook_size, "vq_embed_dim": spec.embed_dim}
        twin = VQModel(**config, **sizes)
    else:
        twin = AutoencoderKL(**config)
    twin.load_state_dict(_converted(state, config), strict=True)
    return twin.eval().requires_grad_(False)


def _converted(state, config):
    """Translate names by diffusers' loader, and by its helper what that leaves to the reader."""
    levels = {name: value for name, value in state.items() if ".attn." in name}
    rest = {f"first_stage_model.{name}": state[name] for name in state if name not in levels}
    found = convert_ldm_vae_checkpoint(rest, config)
    depth = len(config["down_block_types"])
    for level in range(depth):
        for old, new in (
            (f"encoder.down.{level}", f"encoder.down_blocks.{level}"),
            (f"decoder.up.{level}", f"decoder.up_blocks.{depth - 1 - level}"),
        ):
            update_vae_attentions_ldm_to_diffusers(
                [name for name in levels if name.startswith(f"{old}.")],
                found,
                levels,
                {"old": f"{old}.attn", "new": f"{new}.attentions"},
            )
    if "quantize.embedding.weight" in state:
        found["quantize.embedding.weight"] = state["quantize.embedding.weight"]
    return {
        name: value[:, :, 0, 0] if ".attentions." in name and value.ndim == 4 else value
        for name, value in found.items()
    }
