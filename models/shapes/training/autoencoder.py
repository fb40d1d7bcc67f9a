"""The autoencoder of the shapes model: its data, its training and the latents it makes."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ldm_export.networks.autoencoder import LatentDecoder, LatentEncoder
from ldm_runtime.testing import autoencoder_spec
from models.shapes.catalog.learning_rate import Cycle
from models.shapes.data import scenes
from models.shapes.training.precision import autocast
from models.shapes.training.trainer import WORK, Trainer

NUM_SCENES = 40_000
NUM_CHECKED = 256  # the last scenes are never trained on

AUTOENCODER = autoencoder_spec(
    channels=64, channel_mult=(1, 1, 2), num_res_blocks=1, latent_scale_factor=1.0
)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Part of the autoencoder's training: its steps, the side of its crops and its batch size."""

    steps: int
    size: int
    batch: int


#: Small crops first: four times the steps for the same work.
AUTOENCODER_PHASES = (
    Phase(steps=4500, size=32, batch=8),
    Phase(steps=1500, size=64, batch=8),
)
#: Weight of saturated pixels in the autoencoder's loss. Without it the mean image, grey, is a
#: good answer for a long time, because the shapes cover a tenth of a scene.
SATURATION_WEIGHT = 4.0
KL_WEIGHT = 1e-6


def load_data() -> tuple[Tensor, list[str]]:
    """Return images (N, 3, 64, 64) uint8 and their captions, made once and cached."""
    path = WORK / "data.npz"
    if not path.exists():
        source = scenes.random_scenes(np.random.default_rng(1), held_out=False)
        sampled = [next(source) for _ in range(NUM_SCENES)]
        arrays = [np.rint(scenes.render(scene) * 255).astype(np.uint8) for scene in sampled]
        captions = [scenes.caption(scene) for scene in sampled]
        WORK.mkdir(exist_ok=True)
        np.savez(path, images=np.stack(arrays), captions=np.array(captions))
    with np.load(path) as data:
        images = torch.from_numpy(data["images"]).permute(0, 3, 1, 2).contiguous()
        return images, data["captions"].tolist()


def as_input(images: Tensor) -> Tensor:
    """Map uint8 images to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def train_autoencoder() -> None:
    """Train the autoencoder: reconstruction with saturated pixels weighted, plus a small KL."""
    images, _ = load_data()
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"encoder": LatentEncoder(AUTOENCODER), "decoder": LatentDecoder(AUTOENCODER)}
    )
    trainer = Trainer(
        "autoencoder", model, Cycle(end=sum(phase.steps for phase in AUTOENCODER_PHASES))
    )

    def loss_at(step: int) -> Tensor:
        image = as_input(_crops(images[:-NUM_CHECKED], step))
        with autocast():
            mean, log_variance = model["encoder"](image).float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-30, 20)
            noise = torch.exp(0.5 * log_variance) * torch.randn_like(mean)
            error = model["decoder"](mean + noise).float() - image
        saturation = image.amax(1, keepdim=True) - image.amin(1, keepdim=True)
        weight = 1 + SATURATION_WEIGHT * saturation
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss: Tensor = (weight * (error.abs() + error.square())).mean() + KL_WEIGHT * kl
        return loss

    trainer.run(loss_at, lambda: check_autoencoder(trainer.ema, images[-NUM_CHECKED:]))


def _crops(images: Tensor, step: int) -> Tensor:
    first, second = AUTOENCODER_PHASES
    phase = first if step < first.steps else second
    chosen = images[torch.randint(len(images), (phase.batch,))]
    top, left = (4 * torch.randint((scenes.SIZE - phase.size) // 4 + 1, (2,))).tolist()
    return chosen[:, :, top : top + phase.size, left : left + phase.size]


@torch.no_grad()
def check_autoencoder(weights: dict[str, Tensor], images: Tensor) -> dict[str, float]:
    """Return PSNR (dB) on held-out images and the mean error (grey levels) inside shapes."""
    encoder, decoder = load_autoencoder(weights)
    image = as_input(images)
    means = [encoder(part).chunk(2, dim=1)[0] for part in torch.split(image, 32)]
    output = torch.cat([decoder(part) for part in means]).clamp(-1, 1)
    error = 127.5 * (output - image)
    inside = (image.amax(1) - image.amin(1)) > 0.5
    return {
        "psnr": 20 * math.log10(255) - 10 * math.log10(error.square().mean().item()),
        "shape_error": error.abs().mean(1)[inside].mean().item(),
    }


def load_autoencoder(weights: dict[str, Tensor]) -> tuple[LatentEncoder, LatentDecoder]:
    """Return the two halves of the autoencoder with the given trained weights."""
    encoder, decoder = LatentEncoder(AUTOENCODER), LatentDecoder(AUTOENCODER)
    for name, half in (("encoder", encoder), ("decoder", decoder)):
        half.load_state_dict(under(f"{name}.", weights))
        half.eval()
    return encoder, decoder


@torch.no_grad()
def load_latents() -> tuple[Tensor, float]:
    """Return the data's latents with unit variance, and the factor that makes it so."""
    path = WORK / "latents.pt"
    if not path.exists():
        images, _ = load_data()
        state = torch.load(WORK / "autoencoder.pt", weights_only=True)
        encoder, _ = load_autoencoder(state["ema"])
        with autocast():
            means = [encoder(as_input(part)).chunk(2, dim=1)[0] for part in torch.split(images, 64)]
        torch.save(torch.cat(means).float(), path)
    latents: Tensor = torch.load(path, weights_only=True)
    scale = 1 / latents.std().item()
    return latents * scale, scale


def under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
