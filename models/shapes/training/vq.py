"""The VQ autoencoders of the small models: their training, checks and loading.

The codebook is a running k-means over what the encoder gives (van den Oord et al. 2017,
arXiv:1711.00937, appendix A.1); the encoder gets the decoder's gradient straight through the
quantisation, and a commitment loss. It begins without quantisation, so that the codebook can be
laid out over latents that mean something already.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_export.networks.autoencoder import LatentDecoder, LatentEncoder
from ldm_export.networks.quantizer import Quantizer
from ldm_runtime.specs.networks import AutoencoderSpec
from models.shapes.catalog.autoencoders import (
    VQ,
    VQ_WITHOUT_ATTENTION,
    WITH_ATTENTION,
    WITHOUT_ATTENTION,
    AutoencoderConfig,
)
from models.shapes.data import scenes
from models.shapes.training.autoencoder import (
    NUM_CHECKED,
    SATURATION_WEIGHT,
    as_input,
    load_data,
    under,
)
from models.shapes.training.codebook import Codes, codes_for, nearest, spread
from models.shapes.training.precision import autocast
from models.shapes.training.reconstruction import reconstruction_scores
from models.shapes.training.trainer import WORK, Trainer

#: Of the images that are never trained on, those that a check in passing looks at.
NUM_GLANCED = 64
COMMITMENT = 0.25
#: On whole images, where what is left are outlines, squared errors count more than absolute ones.
SQUARE_WEIGHT = 4.0
DECAY = 0.995
#: A code is dead when it is used less than this share of what it would be if all were used alike.
#: Backgrounds are most of what there is, so the living ones are used less than their share, too.
DEAD_SHARE = 0.02
REVIVED_EVERY = 50


class Autoencoder(nn.Module):
    """Both halves of a VQ autoencoder and the state of its codebook."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        self.encoder = LatentEncoder(spec)
        self.decoder = LatentDecoder(spec)
        self.codes = Codes(spec)
        self.codebook.requires_grad_(False)

    @property
    def codebook(self) -> Tensor:
        """The codes (N, D), shared with the decoder."""
        quantizer = self.decoder.quantize
        assert isinstance(quantizer, Quantizer), "the autoencoder has no codebook"
        return quantizer.embedding.weight

    def decode_continuous(self, latents: Tensor) -> Tensor:
        """Map latents to images as the decoder does, but without quantising them."""
        image: Tensor = self.decoder.decoder(self.decoder.post_quant_conv(latents))
        return image

    @torch.no_grad()
    def lay_out(self, latents: Tensor) -> None:
        """Put the codes on latents (M, D) that are far from each other."""
        self.codebook.copy_(spread(latents, len(self.codebook)))
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Let the running k-means begin at the codebook as it is."""
        self.codes.count.fill_(1.0)
        self.codes.total.copy_(self.codebook)

    @torch.no_grad()
    def follow(self, latents: Tensor, chosen: Tensor) -> None:
        """Move the codes towards the latents (M, D) that chose them, (M,)."""
        used = torch.bincount(chosen, minlength=len(self.codebook)).float()
        sums = torch.zeros_like(self.codes.total).index_add_(0, chosen, latents)
        self.codes.count.lerp_(used, 1 - DECAY)
        self.codes.total.lerp_(sums, 1 - DECAY)
        self.codebook.copy_(self.codes.total / self.codes.count.clamp(min=1e-6)[:, None])

    @torch.no_grad()
    def revive(self, latents: Tensor, chosen: Tensor) -> None:
        """Move dead codes to latents (M, D) that are badly served by the codes they chose, (M,)."""
        fair = self.codes.count.mean()
        dead = torch.nonzero(self.codes.count < DEAD_SHARE * fair)[:, 0][: len(latents)]
        if not len(dead):
            return
        errors = (latents - self.codebook[chosen]).square().sum(1)
        places = torch.multinomial(errors + 1e-12, len(dead))
        self.codebook[dead] = latents[places]
        self.codes.count[dead] = 0.5 * fair
        self.codes.total[dead] = 0.5 * fair * latents[places]


def train_vq() -> None:
    """Train the autoencoder that all models but inpainting share."""
    torch.manual_seed(0)
    model = Autoencoder(VQ)
    _train(WITH_ATTENTION, model)


def train_vq_without_attention() -> None:
    """Train inpainting's autoencoder, beginning with the weights of the other where they fit."""
    torch.manual_seed(0)
    model = Autoencoder(VQ_WITHOUT_ATTENTION)
    state = torch.load(WORK / f"{WITH_ATTENTION.run}.pt", weights_only=True)["ema"]
    attention = [name for name in state if ".attn_1." in name]
    model.load_state_dict({name: state[name] for name in state if name not in attention})
    model.start()
    _train(WITHOUT_ATTENTION, model)


def _train(config: AutoencoderConfig, model: Autoencoder) -> None:
    images, _ = load_data()
    trained, held_out = images[:-NUM_CHECKED], images[-NUM_GLANCED:]
    trainer = Trainer(config.run, model, *config.cycles)
    trainer.run(
        lambda step: vq_loss(model, config, trained, step),
        lambda: check_vq(config, trainer.ema, held_out),
    )


def vq_loss(model: Autoencoder, config: AutoencoderConfig, images: Tensor, step: int) -> Tensor:
    """Return the loss of a step and move the codebook.

    Args:
        model: In training.
        config: Its training configuration.
        images: (N, 3, 64, 64) uint8.
        step: Which step this is.
    """
    if step == config.quantised_from > 0:
        model.lay_out(_latents_of(model, images[torch.randint(len(images), (256,))]))
    image = as_input(_crops(images, *config.batch_at(step)))
    with autocast():
        latents = model.encoder(image).float()
    commitment = torch.zeros(())
    passed = latents
    if step >= config.quantised_from:
        flat = latents.detach().movedim(1, 3).flatten(0, 2)
        chosen = nearest(flat, model.codebook)
        codes = codes_for(latents, model.codebook, chosen)
        commitment = F.mse_loss(latents, codes)
        passed = latents + (codes - latents).detach()
        model.follow(flat, chosen)
        if step % REVIVED_EVERY == 0 and step < config.revived_until:
            model.revive(flat, chosen)
    with autocast():
        error = model.decode_continuous(passed).float() - image
    squares = SQUARE_WEIGHT if step >= config.whole_from else 1.0
    weight = 1 + SATURATION_WEIGHT * (image.amax(1, keepdim=True) - image.amin(1, keepdim=True))
    loss: Tensor = (weight * (error.abs() + squares * error.square())).mean()
    return loss + COMMITMENT * commitment


@torch.no_grad()
def _latents_of(model: Autoencoder, images: Tensor) -> Tensor:
    latents: Tensor = model.encoder(as_input(images))
    return latents.movedim(1, 3).flatten(0, 2)


def _crops(images: Tensor, batch: int, size: int) -> Tensor:
    chosen = images[torch.randint(len(images), (batch,))]
    top, left = (4 * torch.randint((scenes.SIZE - size) // 4 + 1, (2,))).tolist()
    return chosen[:, :, top : top + size, left : left + size]


@torch.no_grad()
def check_vq(
    config: AutoencoderConfig, weights: dict[str, Tensor], images: Tensor
) -> dict[str, float]:
    """Return how well images (N, 3, 64, 64) uint8 come back through the codebook.

    `continuous_psnr` is what they would without it, `codes` the codes in use.
    """
    model = open_vq(config.spec, weights)
    parts = torch.split(as_input(images), 32)
    latents = torch.cat([model.encoder(part) for part in parts])
    chosen = nearest(latents.movedim(1, 3).flatten(0, 2), model.codebook)
    codes = codes_for(latents, model.codebook, chosen)
    decoded = [
        torch.cat([model.decode_continuous(part) for part in torch.split(each, 32)])
        for each in (codes, latents)
    ]
    scores = reconstruction_scores(images, decoded[0])
    scores["continuous_psnr"] = reconstruction_scores(images, decoded[1])["psnr"]
    return scores | {"codes": float(len(set(chosen.tolist()))), "latent_std": latents.std().item()}


def open_vq(spec: AutoencoderSpec, weights: dict[str, Tensor]) -> Autoencoder:
    """Return an autoencoder with the given weights, not for training."""
    model = Autoencoder(spec)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def load_vq(config: AutoencoderConfig) -> Autoencoder:
    """Return an autoencoder as its training left it, moving averages of the weights."""
    state = torch.load(WORK / f"{config.run}.pt", weights_only=True)
    return open_vq(config.spec, state["ema"])


def halves_of(model: Autoencoder) -> dict[str, Tensor]:
    """Return the weights by their names in `VQModelInterface`, encoder and decoder together."""
    state = model.state_dict()
    return under("encoder.", state) | under("decoder.", state)


def check_saved(run: str) -> dict[str, float]:
    """Return how well all images that were never trained on come back, as training left it."""
    config = next(each for each in (WITH_ATTENTION, WITHOUT_ATTENTION) if each.run == run)
    state = torch.load(WORK / f"{config.run}.pt", weights_only=True)
    images, _ = load_data()
    return check_vq(config, state["ema"], images[-NUM_CHECKED:])
