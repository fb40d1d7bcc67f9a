"""Training data of the models: scenes behind the images, their latents, and masks.

All of it is derived from `autoencoder.load_data` and made once; the last `NUM_CHECKED` rows that a
model uses are never trained on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from ldm_export.networks.autoencoder import LatentEncoder
from models.shapes.catalog.autoencoders import AutoencoderConfig
from models.shapes.catalog.models import TrainedModel
from models.shapes.data import scenes
from models.shapes.data.masks import Mask, random_mask
from models.shapes.evaluation.scores import EvaluationPrompt
from models.shapes.training.autoencoder import NUM_SCENES, as_input, load_data
from models.shapes.training.precision import autocast
from models.shapes.training.trainer import WORK
from models.shapes.training.vq import load_vq

_MASKS_SEED, _WORDINGS_SEED = 3, 9
_BATCH = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """The rows of the data that a model uses.

    Attributes:
        rows: Their numbers in the data, (N,).
        prompts: Scenes, with masks for inpainting.
        latents: (N, 3, 16, 16), of unit variance.
        scale: The factor that makes it so.
        masked: For inpainting, latents of the masked images as the encoder gives them,
            and the mask behind them, (N, 4, 16, 16).
    """

    rows: Tensor
    prompts: Sequence[EvaluationPrompt]
    latents: Tensor
    scale: float
    masked: Tensor | None


def load_corpus(model: TrainedModel) -> Corpus:
    """Return the training data of a model; missing files are made, which takes minutes."""
    sampled = load_scenes()
    rows = rows_of(sampled, model)
    first = model.most_rows if model.task == "inpainting" else NUM_SCENES
    latents = cached(f"{model.autoencoder.run}_latents", lambda: _encode(model, first))
    scale = 1 / latents.std().item()
    masks: list[Mask | None] = [None] * len(rows)
    masked = None
    if model.task == "inpainting":
        found = [mask_of(row) for row in rows]
        encoded = cached("masked_latents", lambda: _encode_masked(model.autoencoder, first))
        latent_masks = torch.stack([latent_mask(mask) for mask in found])
        masked, masks = torch.cat([encoded[rows], latent_masks], dim=1), [*found]
    return Corpus(
        rows=torch.tensor(rows),
        prompts=[
            EvaluationPrompt(scene=sampled[row], mask=mask, wording=wording_of(row))
            for row, mask in zip(rows, masks, strict=True)
        ],
        latents=latents[rows] * scale,
        scale=scale,
        masked=masked,
    )


def load_scale(config: AutoencoderConfig) -> float:
    """Return the factor that gives an autoencoder's latents unit variance."""
    latents = torch.load(WORK / f"{config.run}_latents.pt", weights_only=True)
    return float(1 / latents.std().item())


def rows_of(sampled: Sequence[scenes.Scene], model: TrainedModel) -> list[int]:
    """Return the numbers of the scenes that a model uses."""
    few = [row for row, each in enumerate(sampled) if len(each.things) <= model.most_things]
    return [row for row in few if row < model.most_rows]


def load_scenes() -> list[scenes.Scene]:
    """Return the scenes of `load_data`, sampled again without their images and cached.

    Raises:
        ValueError: They are not those of the images.
    """
    path = WORK / "scenes.json"
    if not path.exists():
        source = scenes.random_scenes(np.random.default_rng(1), held_out=False)
        sampled = [next(source) for _ in range(NUM_SCENES)]
        with np.load(WORK / "data.npz") as data:
            captions = data["captions"].tolist()
        if captions != [scenes.caption(each) for each in sampled]:
            raise ValueError("data.npz shows other scenes than those sampled now; remove it")
        path.write_bytes(msgspec.json.encode(sampled))
    return msgspec.json.decode(path.read_bytes(), type=list[scenes.Scene])


def mask_of(row: int) -> Mask:
    """Return the mask of a row of the data."""
    return random_mask(np.random.default_rng((_MASKS_SEED, row)))


def wording_of(row: int) -> scenes.Wording:
    """Return how much of its scene the caption of a row of the data tells."""
    return scenes.random_wording(np.random.default_rng((_WORDINGS_SEED, row)))


def latent_mask(mask: Mask) -> Tensor:
    """Return a mask (64, 64) as the UNet sees it: (1, 16, 16), 1 inside and -1 outside.

    Of every latent pixel the first pixel decides, as in the paper's code.
    """
    return torch.from_numpy(mask[::4, ::4].astype(np.float32))[None] * 2 - 1


@torch.no_grad()
def _encode(model: TrainedModel, count: int) -> Tensor:
    images, _ = load_data()
    encoder = load_vq(model.autoencoder).encoder
    return _latents(encoder, as_input, torch.split(images[:count], _BATCH))


@torch.no_grad()
def _encode_masked(config: AutoencoderConfig, count: int) -> Tensor:
    """Encode images whose masked region is -1, black, as the paper's code does."""
    images, _ = load_data()
    encoder = load_vq(config).encoder
    masks = torch.from_numpy(np.stack([mask_of(row) for row in range(count)]))[:, None]

    def masked(part: Tensor) -> Tensor:
        return torch.where(masks[part], -1.0, as_input(images[part]))

    return _latents(encoder, masked, torch.split(torch.arange(count), _BATCH))


def _latents(
    encoder: LatentEncoder, prepare: Callable[[Tensor], Tensor], parts: Sequence[Tensor]
) -> Tensor:
    with autocast():
        return torch.cat([encoder(prepare(part)).float() for part in parts])


def cached(name: str, make: Callable[[], Tensor]) -> Tensor:
    """Return a tensor from a file of the working folder, which is made if it is not there."""
    path = WORK / f"{name}.pt"
    if not path.exists():
        torch.save(make(), path)
    tensor: Tensor = torch.load(path, weights_only=True)
    return tensor
