"""What the systems learn from: the scenes behind the pictures, their latents, and holes in them.

All of it is derived from `first_stage.load_data` and made once; the last `NUM_CHECKED` rows that a
system uses are never trained on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from ldm_export.networks.autoencoder import LatentEncoder
from models.shapes.catalog.recipes import Recipe
from models.shapes.catalog.systems import System
from models.shapes.data import scenes
from models.shapes.data.holes import Mask, random_hole
from models.shapes.evaluation.scores import Question
from models.shapes.training.first_stage import NUM_SCENES, as_input, load_data
from models.shapes.training.trainer import WORK
from models.shapes.training.vq import load_first_stage

_HOLES_SEED = 3
_BATCH = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """The rows of the data that a system uses.

    Attributes:
        rows: Their numbers in the data, (N,).
        questions: Scenes, with holes for inpainting.
        latents: (N, 3, 16, 16), of unit variance.
        scale: The factor that makes it so.
        masked: For inpainting, latents of the pictures with their holes as the encoder gives them,
            and the mask behind them, (N, 4, 16, 16).
    """

    rows: Tensor
    questions: Sequence[Question]
    latents: Tensor
    scale: float
    masked: Tensor | None


def load_corpus(system: System) -> Corpus:
    """Return what a system learns from; what is not yet there is made, which takes minutes."""
    drawn = load_scenes()
    rows = rows_of(drawn, system)
    first = system.most_rows if system.task == "inpainting" else NUM_SCENES
    latents = _cached(f"{system.first_stage.stage}_latents", lambda: _encode(system, first))
    scale = 1 / latents.std().item()
    holes: list[Mask | None] = [None] * len(rows)
    masked = None
    if system.task == "inpainting":
        found = [hole_of(row) for row in rows]
        encoded = _cached("masked_latents", lambda: _encode_masked(system.first_stage, first))
        masks = torch.stack([latent_mask(hole) for hole in found])
        masked, holes = torch.cat([encoded[rows], masks], dim=1), [*found]
    return Corpus(
        rows=torch.tensor(rows),
        questions=[
            Question(scene=drawn[row], hole=hole) for row, hole in zip(rows, holes, strict=True)
        ],
        latents=latents[rows] * scale,
        scale=scale,
        masked=masked,
    )


def load_scale(recipe: Recipe) -> float:
    """Return the factor that gives a first stage's latents unit variance."""
    latents = torch.load(WORK / f"{recipe.stage}_latents.pt", weights_only=True)
    return float(1 / latents.std().item())


def rows_of(drawn: Sequence[scenes.Scene], system: System) -> list[int]:
    """Return the numbers of the scenes that a system uses."""
    few = [row for row, each in enumerate(drawn) if len(each.things) <= system.most_things]
    return [row for row in few if row < system.most_rows]


def load_scenes() -> list[scenes.Scene]:
    """Return the scenes of `load_data`, drawn again without their pictures and cached.

    Raises:
        ValueError: They are not those of the pictures.
    """
    path = WORK / "scenes.json"
    if not path.exists():
        source = scenes.random_scenes(np.random.default_rng(1), held_out=False)
        drawn = [next(source) for _ in range(NUM_SCENES)]
        with np.load(WORK / "data.npz") as data:
            captions = data["captions"].tolist()
        if captions != [scenes.caption(each) for each in drawn]:
            raise ValueError("data.npz shows other scenes than those drawn now; remove it")
        path.write_bytes(msgspec.json.encode(drawn))
    return msgspec.json.decode(path.read_bytes(), type=list[scenes.Scene])


def hole_of(row: int) -> Mask:
    """Return the hole in the picture of a row of the data."""
    return random_hole(np.random.default_rng((_HOLES_SEED, row)))


def latent_mask(hole: Mask) -> Tensor:
    """Return a hole (64, 64) as the UNet sees it: (1, 16, 16), 1 in the hole and -1 around it.

    Of every latent pixel the first pixel decides, as in the paper's code.
    """
    return torch.from_numpy(hole[::4, ::4].astype(np.float32))[None] * 2 - 1


@torch.no_grad()
def _encode(system: System, count: int) -> Tensor:
    pictures, _ = load_data()
    encoder = load_first_stage(system.first_stage).encoder
    return _latents(encoder, as_input, torch.split(pictures[:count], _BATCH))


@torch.no_grad()
def _encode_masked(recipe: Recipe, count: int) -> Tensor:
    """Encode pictures whose hole is -1, black, as the paper's code does."""
    pictures, _ = load_data()
    encoder = load_first_stage(recipe).encoder
    holes = torch.from_numpy(np.stack([hole_of(row) for row in range(count)]))[:, None]

    def masked(part: Tensor) -> Tensor:
        return torch.where(holes[part], -1.0, as_input(pictures[part]))

    return _latents(encoder, masked, torch.split(torch.arange(count), _BATCH))


def _latents(
    encoder: LatentEncoder, prepare: Callable[[Tensor], Tensor], parts: Sequence[Tensor]
) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([encoder(prepare(part)).float() for part in parts])


def _cached(name: str, make: Callable[[], Tensor]) -> Tensor:
    path = WORK / f"{name}.pt"
    if not path.exists():
        torch.save(make(), path)
    cached: Tensor = torch.load(path, weights_only=True)
    return cached
