"""The UNet and the text encoder of the shapes model: what they learn and how."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import scenes
from first_stage import NUM_CHECKED, load_data, load_latents
from ldm_export.networks.clip import ClipTextEncoder
from ldm_export.networks.unet import UNet
from ldm_runtime.manifest import TextEncoderSpec, UNetSpec
from ldm_runtime.tokenizers import ClipTokenizer
from trainer import HERE, Trainer

VOCABULARY = HERE.parents[1] / "ldm_export/vocabularies/clip_bpe_simple_vocab_16e6.txt.gz"
MAX_TOKENS = 77
END_TOKEN = 49407

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
#: The lowest level has 4x4 pixels: seen from there, left and right of a scene are neighbours.
UNET = UNetSpec(
    in_channels=4,
    out_channels=4,
    model_channels=64,
    channel_mult=(1, 1, 2),
    num_res_blocks=1,
    transformer_depth=(0, 1, 1),
    middle_depth=1,
    num_heads=8,
    num_head_channels=None,
    context_dim=64,
    linear_projection=False,
)
LINEAR_START, LINEAR_END, NUM_TRAIN_TIMESTEPS = 0.00085, 0.012, 1000


STEPS = 13_000
BATCH = 32
CAPTION_DROPOUT = 0.1
#: A timestep's loss, in terms of x0, is weighted by its signal-to-noise ratio within these bounds.
#: The upper one is that of Hang et al. 2023 (arXiv:2303.09556). The lower one gives high noise,
#: where it is decided what goes where, a voice: its share in the loss is tiny otherwise.
WEIGHT_FLOOR, WEIGHT_CEILING = 0.5, 5.0
#: Spread of an offset that all of a channel's noise has in common ("offset noise"). Without it the
#: mean of noisy latents gives the background away, and the caption is not read.
OFFSET = 0.15
#: Weight of what the text encoder also has to say, through a fixed random projection: on which side
#: of the first thing the second and third are; see `token_sides`. Without it "left" and "right"
#: hardly change a context: nothing uses them, so nothing teaches them.
SIDES_WEIGHT = 0.1


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
class VelocityLoss:
    """The loss of UNet and text encoder: of v, the velocity, weighted.

    Source: Salimans and Ho 2022 (arXiv:2202.00512), appendix D. At the last timestep a prediction
    of the noise has to repeat its input to within one percent before it says anything about x0;
    one of v says it at once.

    Attributes:
        unet: Predicts v.
        text: Captions to context.
        latents: Of every picture, (N, 4, 16, 16).
        tokens: Of every caption, (N + 1, 77); the last row is the empty caption.
        alphas: The noise schedule's `alphas_cumprod`, float32.
        sides: `token_sides` of every caption, (N + 1, 77, 2).
        projection: Fixed and random, from context to sides, (64, 2).
    """

    unet: Callable[..., Tensor]
    text: Callable[..., Tensor]
    latents: Tensor
    tokens: Tensor
    alphas: Tensor
    sides: Tensor
    projection: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the loss on some rows of the data."""
        timesteps = _random_timesteps(len(rows))
        alpha = self.alphas[timesteps][:, None, None, None]
        clean, noise = self.latents[rows], torch.randn(len(rows), *self.latents.shape[1:])
        noise = noise + OFFSET * torch.randn(len(rows), clean.shape[1], 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        captions = self._captions(rows)
        with torch.autocast("cpu", torch.bfloat16):
            context = self.text(self.tokens[captions])
            prediction = self.unet(noisy, timesteps.float(), context).float()
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        errors = F.mse_loss(prediction, velocity, reduction="none").mean((1, 2, 3))
        sides_error = self._sides_error(context.float(), captions)
        return (errors * self._weights(timesteps)).mean() + SIDES_WEIGHT * sides_error

    def _sides_error(self, context: Tensor, captions: Tensor) -> Tensor:
        sides = self.sides[captions]
        said = ~sides.isnan()
        return F.mse_loss((context @ self.projection)[said], sides[said])

    def _captions(self, rows: Tensor) -> Tensor:
        dropped = torch.rand(len(rows)) < CAPTION_DROPOUT
        return torch.where(dropped, len(self.tokens) - 1, rows)

    def _weights(self, timesteps: Tensor) -> Tensor:
        ratio = self.alphas[timesteps] / (1 - self.alphas[timesteps])
        return ratio.clamp(WEIGHT_FLOOR, WEIGHT_CEILING) / (1 + ratio)


def _random_timesteps(count: int) -> Tensor:
    """Draw timesteps, every other one from the noisier half."""
    timesteps = torch.randint(NUM_TRAIN_TIMESTEPS, (count,))
    noisier = NUM_TRAIN_TIMESTEPS // 2
    timesteps[::2] = timesteps[::2] % noisier + noisier
    return timesteps


#: The last layer of every residual block, and of the UNet.
_LAST_LAYERS = (
    "out_layers.3.weight",
    "proj_out.weight",
    "out.2.weight",
    "self_attn.out_proj.weight",
    "mlp.fc2.weight",
)


def train_diffusion() -> None:
    """Train UNet and text encoder to predict v; compiled, a step takes a quarter less."""
    _, captions = load_data()
    latents, _ = load_latents()
    torch.manual_seed(0)
    text, unet = ClipTextEncoder(TEXT_ENCODER), UNet(UNET)
    _initialise(text, unet)
    model = nn.ModuleDict({"unet": unet, "text": text})
    loss = VelocityLoss(
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
        rows = torch.split(torch.arange(trained, len(latents)), BATCH)
        losses = [loss(part) for part in 4 * rows]
        return {"held_out_loss": torch.stack(losses).mean().item()}

    with sdpa_kernel(SDPBackend.MATH):  # three times as fast backward for so few tokens
        compiled = replace(loss, unet=torch.compile(unet), text=torch.compile(text))
        Trainer("diffusion", model, STEPS).run(
            lambda _: compiled(torch.randint(trained, (BATCH,))), check
        )


def _initialise(text: ClipTextEncoder, unet: UNet) -> None:
    """Make every block the identity, so that a context begins as its tokens and positions.

    With CLIP's small embeddings and layers as wide as these, a token's word was a few thousandths
    of its context, and for thousands of steps no colour changed a picture.
    """
    nn.init.normal_(text.text_model.embeddings.token_embedding.weight, std=1.0)
    nn.init.normal_(text.text_model.embeddings.position_embedding.weight, std=0.3)
    for module in (text, unet):
        for name, parameter in module.named_parameters():
            if name.endswith(_LAST_LAYERS):
                nn.init.zeros_(parameter)
