"""Train the shapes model: first stage, then text encoder and UNet, then one CompVis checkpoint.

    python models/shapes/train.py autoencoder   # about 30 minutes on two cores
    python models/shapes/train.py diffusion     # about 70 minutes
    python models/shapes/train.py pack          # writes models/shapes/shapes.ckpt and config.yaml

Every stage goes on from its last saved state, seeds are fixed, and the loss goes to `log.jsonl`.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import scenes
from checkpoint_writer import compvis_state, schedule_buffers, write_checkpoint, write_config
from ldm_export.networks.autoencoder import LatentDecoder, LatentEncoder
from ldm_export.networks.clip import ClipTextEncoder
from ldm_export.networks.unet import UNet
from ldm_runtime.manifest import AutoencoderSpec, TextEncoderSpec, UNetSpec
from ldm_runtime.tokenizers import ClipTokenizer

HERE = Path(__file__).parent
WORK = HERE / "work"
VOCABULARY = HERE.parents[1] / "ldm_export/vocabularies/clip_bpe_simple_vocab_16e6.txt.gz"
NUM_SCENES = 20_000
NUM_CHECKED = 256  # the last scenes are never trained on
MAX_TOKENS = 77
END_TOKEN = 49407

AUTOENCODER = AutoencoderSpec(
    kind="kl",
    image_channels=3,
    channels=64,
    channel_mult=(1, 1, 2),
    num_res_blocks=1,
    attention_levels=(),
    z_channels=4,
    embed_dim=4,
    latent_scale_factor=1.0,
)
TEXT_ENCODER = TextEncoderSpec(
    kind="clip",
    width=64,
    num_layers=4,
    num_heads=1,
    feed_forward_dim=256,
    vocab_size=49408,
    max_tokens=MAX_TOKENS,
    activation="quick_gelu",
    pad_token_id=END_TOKEN,
)
UNET = UNetSpec(
    in_channels=4,
    out_channels=4,
    model_channels=64,
    channel_mult=(1, 2),
    num_res_blocks=1,
    transformer_depth=(0, 1),
    middle_depth=1,
    num_heads=8,
    num_head_channels=None,
    context_dim=64,
    linear_projection=False,
)
LINEAR_START, LINEAR_END, NUM_TRAIN_TIMESTEPS = 0.00085, 0.012, 1000


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Part of the first stage's training: how many steps, on squares of how many pixels."""

    steps: int
    size: int
    batch: int


#: Small crops first: four times the steps for the same work.
AUTOENCODER_PHASES = (
    Phase(steps=4500, size=32, batch=8),
    Phase(steps=1500, size=64, batch=8),
)
#: Weight of saturated pixels in the first stage's loss. Without it the mean picture, grey, is a
#: good answer for a long time, because the shapes cover a tenth of a scene.
SATURATION_WEIGHT = 4.0
KL_WEIGHT = 1e-6
DIFFUSION_STEPS = 13300
DIFFUSION_BATCH = 32
CAPTION_DROPOUT = 0.1
#: From this step on a timestep's loss is weighted by min(SNR, 5) / SNR (Hang et al. 2023,
#: arXiv:2303.09556): what is decided at high noise, where things go, had lagged behind the details.
MIN_SNR_FROM, MIN_SNR = 3000, 5.0
#: From this step on every channel's noise gets a common offset of this spread ("offset noise").
#: Without it the mean of noisy latents gives the background away, and the caption is not read.
OFFSET_FROM, OFFSET = 4500, 0.15
#: From this step on half of the timesteps are drawn from the noisier half, and a timestep's weight
#: in terms of x0 is at least this, however low its SNR. Until then "left of" was not learned.
LAYOUT_FROM, LAYOUT_WEIGHT = 8000, 0.3
#: From this step on the text encoder also has to say, through a fixed random projection, on which
#: side of the first thing the second and third are; see `token_sides`. Until then "left" and
#: "right" hardly changed a context: nothing used them, so nothing taught them.
SIDES_FROM, SIDES_WEIGHT = 9000, 0.1
#: Where the learning rate starts anew (Loshchilov and Hutter 2017, arXiv:1608.03983).
DIFFUSION_RESTART = 8500
EMA_DECAY = 0.999
LEARNING_RATE = 1e-3


def load_data() -> tuple[Tensor, list[str]]:
    """Return pictures (N, 3, 64, 64) uint8 and their captions, drawn once and cached."""
    path = WORK / "data.npz"
    if not path.exists():
        source = scenes.random_scenes(np.random.default_rng(1), held_out=False)
        drawn = [next(source) for _ in range(NUM_SCENES)]
        drawings = [np.rint(scenes.render(scene) * 255).astype(np.uint8) for scene in drawn]
        captions = [scenes.caption(scene) for scene in drawn]
        WORK.mkdir(exist_ok=True)
        np.savez(path, pictures=np.stack(drawings), captions=np.array(captions))
    with np.load(path) as data:
        pictures = torch.from_numpy(data["pictures"]).permute(0, 3, 1, 2).contiguous()
        return pictures, data["captions"].tolist()


def as_input(pictures: Tensor) -> Tensor:
    """Map uint8 pictures to float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


class Trainer:
    """AdamW with warm-up and cosine decay, an EMA of the weights, saved state and a log."""

    def __init__(self, name: str, model: nn.Module, steps: int, restart: int = 0) -> None:
        self.name, self.model, self.steps, self.step = name, model, steps, 0
        self.restart = restart
        self.ema = {key: value.clone() for key, value in model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.path = WORK / f"{name}.pt"
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema, self.step = state["ema"], state["step"]

    def run(self, loss_at: Callable[[int], Tensor], check: Callable[[], dict[str, float]]) -> None:
        """Take the steps that are left; `loss_at(step)` must depend on the step alone."""
        started, total = time.monotonic(), 0.0
        while self.step < self.steps:
            torch.manual_seed(1_000_000 + self.step)
            self._set_learning_rate()
            loss = loss_at(self.step)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step, total = self.step + 1, total + loss.item()
            self._update_ema()
            if self.step % 100 == 0 or self.step == self.steps:
                row = {"loss": total / 100, "seconds": time.monotonic() - started}
                total = 0.0
                if self.step % 500 == 0 or self.step == self.steps:
                    row |= check()
                    self.save()
                self.log(row)

    def save(self) -> None:
        """Write the whole state, then rename, so that a crash never loses it."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema,
            "step": self.step,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(self.path)

    def log(self, row: dict[str, float]) -> None:
        """Append one line to the log."""
        rounded = {key: float(f"{value:.4g}") for key, value in row.items()}
        line = json.dumps({"stage": self.name, "step": self.step} | rounded)
        with (HERE / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def _set_learning_rate(self) -> None:
        begin, end = (self.restart, self.steps) if self.step >= self.restart else (0, self.restart)
        warm = min(1.0, (self.step - begin + 1) / 200)
        decay = 0.5 * (1 + math.cos(math.pi * (self.step - begin) / (end - begin)))
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warm * max(decay, 0.01)

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        for key, value in self.model.state_dict().items():
            self.ema[key].lerp_(value, 1 - decay)


def train_autoencoder() -> None:
    """Train the first stage: reconstruction with saturated pixels weighted, plus a small KL."""
    pictures, _ = load_data()
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"encoder": LatentEncoder(AUTOENCODER), "decoder": LatentDecoder(AUTOENCODER)}
    )
    trainer = Trainer("autoencoder", model, sum(phase.steps for phase in AUTOENCODER_PHASES))

    def loss_at(step: int) -> Tensor:
        image = as_input(_crops(pictures[:-NUM_CHECKED], step))
        with torch.autocast("cpu", torch.bfloat16):
            mean, log_variance = model["encoder"](image).float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-30, 20)
            noise = torch.exp(0.5 * log_variance) * torch.randn_like(mean)
            error = model["decoder"](mean + noise).float() - image
        saturation = image.amax(1, keepdim=True) - image.amin(1, keepdim=True)
        weight = 1 + SATURATION_WEIGHT * saturation
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss: Tensor = (weight * (error.abs() + error.square())).mean() + KL_WEIGHT * kl
        return loss

    trainer.run(loss_at, lambda: check_autoencoder(trainer.ema, pictures[-NUM_CHECKED:]))


def _crops(pictures: Tensor, step: int) -> Tensor:
    first, second = AUTOENCODER_PHASES
    phase = first if step < first.steps else second
    chosen = pictures[torch.randint(len(pictures), (phase.batch,))]
    top, left = (4 * torch.randint((scenes.SIZE - phase.size) // 4 + 1, (2,))).tolist()
    return chosen[:, :, top : top + phase.size, left : left + phase.size]


@torch.no_grad()
def check_autoencoder(weights: dict[str, Tensor], pictures: Tensor) -> dict[str, float]:
    """Return PSNR (dB) on held-out pictures and the mean error (grey levels) inside shapes."""
    encoder, decoder = load_autoencoder(weights)
    image = as_input(pictures)
    means = [encoder(part).chunk(2, dim=1)[0] for part in torch.split(image, 32)]
    output = torch.cat([decoder(part) for part in means]).clamp(-1, 1)
    error = 127.5 * (output - image)
    inside = (image.amax(1) - image.amin(1)) > 0.5
    return {
        "psnr": 20 * math.log10(255) - 10 * math.log10(error.square().mean().item()),
        "shape_error": error.abs().mean(1)[inside].mean().item(),
    }


def load_autoencoder(weights: dict[str, Tensor]) -> tuple[LatentEncoder, LatentDecoder]:
    """Return the two halves of the first stage with the given trained weights."""
    encoder, decoder = LatentEncoder(AUTOENCODER), LatentDecoder(AUTOENCODER)
    for name, half in (("encoder", encoder), ("decoder", decoder)):
        half.load_state_dict(_under(f"{name}.", weights))
        half.eval()
    return encoder, decoder


@torch.no_grad()
def load_latents() -> tuple[Tensor, float]:
    """Return the data's latents with unit variance, and the factor that makes it so."""
    path = WORK / "latents.pt"
    if not path.exists():
        pictures, _ = load_data()
        state = torch.load(WORK / "autoencoder.pt", weights_only=True)
        encoder, _ = load_autoencoder(state["ema"])
        with torch.autocast("cpu", torch.bfloat16):
            means = [
                encoder(as_input(part)).chunk(2, dim=1)[0] for part in torch.split(pictures, 64)
            ]
        torch.save(torch.cat(means).float(), path)
    latents: Tensor = torch.load(path, weights_only=True)
    scale = 1 / latents.std().item()
    return latents * scale, scale


def training_alphas_cumprod() -> Tensor:
    """Return the noise schedule of Stable Diffusion: linear in the root of beta, float64."""
    roots = torch.linspace(
        LINEAR_START**0.5, LINEAR_END**0.5, NUM_TRAIN_TIMESTEPS, dtype=torch.float64
    )
    return torch.cumprod(1 - roots.square(), dim=0)


def load_tokens(captions: list[str]) -> Tensor:
    """Return token ids (N, 77) of captions; the last row is the empty caption."""
    tokenizer = ClipTokenizer.from_file(VOCABULARY)
    cache: dict[str, tuple[int, ...]] = {}
    for text in [*captions, ""]:
        if text not in cache:
            cache[text] = tokenizer.encode(text, MAX_TOKENS, pad_token_id=END_TOKEN).ids
    return torch.tensor([cache[text] for text in [*captions, ""]])


def token_sides(caption: str) -> Tensor:
    """Return on which side of the first thing a token's thing is: (77, 2) of x and y, -1, 0 or 1.

    Rows are NaN for tokens that do not name a second or third thing. In CLIP's vocabulary each word
    of these captions is one token.
    """
    sides = torch.full((MAX_TOKENS, 2), math.nan)
    words = caption.split()
    for index, word in enumerate(words):
        relation = word if word in scenes.RELATIONS else " ".join(words[index : index + 2])
        if relation in scenes.RELATIONS:
            begin = 1 + index + len(relation.split())  # the start token comes first
            sides[begin : begin + 4] = torch.tensor(scenes.RELATIONS[relation], dtype=torch.float32)
    return sides


@dataclass(frozen=True, kw_only=True)
class NoisePrediction:
    """The loss of UNet and text encoder: Ho et al. 2020 (arXiv:2006.11239), equation 14, weighted.

    Attributes:
        unet: Predicts noise.
        text: Captions to context.
        latents: Of every picture, (N, 4, 16, 16).
        tokens: Of every caption, (N + 1, 77); the last row is the empty caption.
        alphas: The noise schedule's `alphas_cumprod`, float32.
        sides: `token_sides` of every caption, (N + 1, 77, 2).
        projection: Fixed and random, from context to sides, (64, 2).
    """

    unet: nn.Module
    text: nn.Module
    latents: Tensor
    tokens: Tensor
    alphas: Tensor
    sides: Tensor
    projection: Tensor

    def __call__(self, rows: Tensor, step: int) -> Tensor:
        """Return the loss on some rows of the data, as it is defined at a step of the recipe."""
        timesteps = self._timesteps(len(rows), step)
        alpha = self.alphas[timesteps][:, None, None, None]
        clean, noise = self.latents[rows], torch.randn(len(rows), *self.latents.shape[1:])
        if step >= OFFSET_FROM:
            noise = noise + OFFSET * torch.randn(len(rows), clean.shape[1], 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        captions = self._captions(rows)
        with torch.autocast("cpu", torch.bfloat16):
            context = self.text(self.tokens[captions])
            prediction = self.unet(noisy, timesteps.float(), context).float()
        errors = F.mse_loss(prediction, noise, reduction="none").mean((1, 2, 3))
        loss = (errors * self._weights(timesteps, step)).mean()
        if step >= SIDES_FROM:
            loss = loss + SIDES_WEIGHT * self._sides_error(context.float(), captions)
        return loss

    def _sides_error(self, context: Tensor, captions: Tensor) -> Tensor:
        sides = self.sides[captions]
        said = ~sides.isnan()
        return F.mse_loss((context @ self.projection)[said], sides[said])

    def _timesteps(self, count: int, step: int) -> Tensor:
        timesteps = torch.randint(NUM_TRAIN_TIMESTEPS, (count,))
        if step >= LAYOUT_FROM:
            noisier = NUM_TRAIN_TIMESTEPS // 2
            timesteps[::2] = timesteps[::2] % noisier + noisier
        return timesteps

    def _captions(self, rows: Tensor) -> Tensor:
        dropped = torch.rand(len(rows)) < CAPTION_DROPOUT
        return torch.where(dropped, len(self.tokens) - 1, rows)

    def _weights(self, timesteps: Tensor, step: int) -> Tensor:
        if step < MIN_SNR_FROM:
            return torch.ones(len(timesteps))
        ratio = self.alphas[timesteps] / (1 - self.alphas[timesteps])
        low = LAYOUT_WEIGHT if step >= LAYOUT_FROM else 0.0
        return ratio.clamp(min=low, max=MIN_SNR) / ratio


def train_diffusion() -> None:
    """Train UNet and text encoder to predict noise."""
    _, captions = load_data()
    latents, _ = load_latents()
    torch.manual_seed(0)
    text, unet = ClipTextEncoder(TEXT_ENCODER), UNet(UNET)
    _initialise(text, unet)
    model = nn.ModuleDict({"unet": unet, "text": text})
    loss = NoisePrediction(
        unet=unet,
        text=text,
        latents=latents,
        tokens=load_tokens(captions),
        alphas=training_alphas_cumprod().float(),
        sides=torch.stack([token_sides(text) for text in [*captions, ""]]),
        projection=torch.randn(UNET.context_dim, 2) / UNET.context_dim**0.5,
    )
    trained = len(latents) - NUM_CHECKED

    @torch.no_grad()
    def check() -> dict[str, float]:
        torch.manual_seed(0)
        losses = [loss(torch.arange(trained, len(latents)), 0) for _ in range(4)]
        return {"held_out_loss": torch.stack(losses).mean().item()}

    with sdpa_kernel(SDPBackend.MATH):  # three times as fast backward for so few tokens
        Trainer("diffusion", model, DIFFUSION_STEPS, DIFFUSION_RESTART).run(
            lambda step: loss(torch.randint(trained, (DIFFUSION_BATCH,)), step), check
        )


def _initialise(text: ClipTextEncoder, unet: UNet) -> None:
    nn.init.normal_(text.text_model.embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(text.text_model.embeddings.position_embedding.weight, std=0.02)
    for name, parameter in unet.named_parameters():
        if name.endswith(("out_layers.3.weight", "proj_out.weight", "out.2.weight")):
            nn.init.zeros_(parameter)  # every block starts as the identity


def pack() -> None:
    """Write the trained weights as a CompVis-style checkpoint in fp16, and its configuration."""
    first_stage = torch.load(WORK / "autoencoder.pt", weights_only=True)
    diffusion = torch.load(WORK / "diffusion.pt", weights_only=True)
    _, scale = load_latents()
    # `encoder.encoder.*` and `encoder.quant_conv.*` here, one level less in a checkpoint.
    halves = {name.split(".", 1)[1]: value for name, value in first_stage["ema"].items()}
    state = compvis_state(
        halves,
        _under("text.", diffusion["ema"]),
        _under("unet.", diffusion["model"]),
        _under("unet.", diffusion["ema"]),
    )
    state |= schedule_buffers(training_alphas_cumprod())
    state["scale_factor"] = torch.tensor(scale)
    write_checkpoint(HERE / "shapes.ckpt", state, diffusion["step"])
    write_config(
        HERE / "shapes.yaml",
        unet=UNET,
        autoencoder=AUTOENCODER,
        text_encoder=TEXT_ENCODER,
        schedule=(LINEAR_START, LINEAR_END, NUM_TRAIN_TIMESTEPS),
        latent_size=scenes.SIZE // AUTOENCODER.factor,
    )


def _under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    stages = {"autoencoder": train_autoencoder, "diffusion": train_diffusion, "pack": pack}
    parser.add_argument("stage", choices=stages)
    stages[parser.parse_args().stage]()


if __name__ == "__main__":
    main()
