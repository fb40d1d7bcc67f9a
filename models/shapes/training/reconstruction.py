"""Reconstruction error of an autoencoder on images."""

import torch
from torch import Tensor

from models.shapes.evaluation import detector
from models.shapes.evaluation.scores import decibels

_INSIDE = 0.5 * 255  # spread of a pixel's channels from which it is inside a shape


def reconstruction_scores(images: Tensor, decoded: Tensor) -> dict[str, float]:
    """Return PSNR (dB), the mean error inside shapes (grey levels) and the share read the same.

    Args:
        images: (N, 3, 64, 64) uint8.
        decoded: The reconstructions, likewise, float in [-1, 1] or a little beyond.
    """
    levels = (127.5 * (decoded.clamp(-1, 1) + 1)).round()
    error = levels - images.float()
    inside = (images.amax(1).float() - images.amin(1).float()) > _INSIDE
    return {
        "psnr": decibels(error.square().mean().item()),
        "shape_error": error.abs().mean(1)[inside].mean().item(),
        "readable": _share_read_alike(images, levels.to(torch.uint8)),
    }


def _share_read_alike(images: Tensor, decoded: Tensor) -> float:
    pairs = zip(images.movedim(1, 3).numpy(), decoded.movedim(1, 3).numpy(), strict=True)
    alike = [_said(detector.read_image(a)) == _said(detector.read_image(b)) for a, b in pairs]
    return sum(alike) / len(alike)


def _said(reading: detector.Reading) -> tuple[object, ...]:
    """Return the content of a reading in words: every thing, and the background."""
    things = sorted(thing[:3] for thing in reading.things)
    return things, reading.background, reading.gradient
