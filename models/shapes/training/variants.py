"""Training of the descendants of the shapes model, and their checkpoints: a UNet alone."""

import torch
from torch import Tensor, nn

from ldm_export.networks.unet import UNet
from models.shapes.catalog.variants import Variant
from models.shapes.data import scenes
from models.shapes.training.autoencoder import (
    AUTOENCODER,
    as_input,
    load_autoencoder,
    load_data,
    load_latents,
)
from models.shapes.training.checkpoint_writer import averaged_state, write_checkpoint
from models.shapes.training.clip_text import TEXT_ENCODER
from models.shapes.training.config_writer import ModelConfig, write_model_config
from models.shapes.training.corpus import cached, mask_of
from models.shapes.training.diffusion import CaptionLoss, load_contexts, train_captioned
from models.shapes.training.precision import autocast
from models.shapes.training.trainer import HERE, WORK

_BATCH = 64


def train_variant(variant: Variant) -> None:
    """Train a variant's UNet to predict v, from the averaged weights of the shapes model."""
    latents, scale = load_latents()
    rows = slice(len(latents) - variant.most_rows, None)
    contexts = load_contexts()
    unet = _first(variant)
    loss = CaptionLoss(
        unet=unet,
        latents=latents[rows],
        contexts=contexts[rows.start :],
        concat=_concat(variant, scale),
        noise=variant.noise,
    )
    train_captioned(variant.name, unet, loss, variant.cycles, variant.layout_steps)


def _first(variant: Variant) -> UNet:
    """Return the shapes model's UNet, whose first layer does not hear of new channels yet."""
    unet = UNet(variant.unet)
    weights = torch.load(WORK / "diffusion.pt", weights_only=True)["ema"]
    name = "input_blocks.0.0.weight"
    known = weights[name]
    widened = known.new_zeros(len(known), variant.unet.in_channels, *known.shape[2:])
    widened[:, : known.shape[1]] = known
    unet.load_state_dict({**weights, name: widened})
    return unet


def _concat(variant: Variant, scale: float) -> Tensor | None:
    """Return what goes into a variant's UNet beside the latents of its data, if anything does."""
    if variant.task != "text-inpainting":
        return None
    return cached(f"{variant.name}_concat", lambda: _encode_masked(variant.most_rows, scale))


@torch.no_grad()
def _encode_masked(count: int, scale: float) -> Tensor:
    """Return what goes into the UNet beside the latents of the last `count` images."""
    images, _ = load_data()
    state = torch.load(WORK / "autoencoder.pt", weights_only=True)
    encoder, _ = load_autoencoder(state["ema"])
    first = len(images) - count
    encoded = []
    for part in torch.split(torch.arange(first, len(images)), _BATCH):
        masks = torch.stack([torch.from_numpy(mask_of(row)) for row in part.tolist()])[:, None]
        with autocast():
            encoded.append(masked_channels(encoder, as_input(images[part]), masks, scale))
    return torch.cat(encoded)


def masked_channels(encoder: nn.Module, images: Tensor, masks: Tensor, scale: float) -> Tensor:
    """Return what goes into the UNet beside the latents of images with holes, (B, 1 + 4, 16, 16).

    As `scripts/inpaint_st.py` of Runway's stable-diffusion makes them: 1 in the mask is missing,
    and there the image is 0, gray.

    Args:
        encoder: Of the autoencoder.
        images: From -1 to 1, (B, 3, 64, 64).
        masks: True where they are missing, (B, 1, 64, 64).
        scale: Brings latents into the UNet's scale.
    """
    mean, _ = encoder(torch.where(masks, 0.0, images)).chunk(2, dim=1)
    step = AUTOENCODER.factor
    return torch.cat([masks[..., ::step, ::step].float(), scale * mean.float()], dim=1)


def pack_variant(variant: Variant) -> int:
    """Write `<name>.ckpt` and `<name>.yaml`; return the checkpoint's bytes."""
    state = torch.load(WORK / f"{variant.name}.pt", weights_only=True)
    _, scale = load_latents()
    weights = averaged_state({}, {}, state["ema"])
    weights["scale_factor"] = torch.tensor(scale)
    weights |= {marker: torch.empty(0) for marker in variant.markers}
    path = HERE / f"{variant.name}.ckpt"
    write_checkpoint(path, weights, state["step"])
    write_model_config(HERE / f"{variant.name}.yaml", config_of(variant))
    return path.stat().st_size


def config_of(variant: Variant) -> ModelConfig:
    """Return the configuration of a variant's checkpoint."""
    return ModelConfig(
        task=variant.task,
        unet=variant.unet,
        autoencoder=AUTOENCODER,
        text_encoder=TEXT_ENCODER,
        schedule=variant.noise.schedule,
        says_prediction_type="v_pred" not in variant.markers,
        latent_size=scenes.SIZE // AUTOENCODER.factor,
        sampling=variant.sampling,
    )
