"""Pictures of diffusers' pipelines, and ours held against them."""

import math

import numpy as np
import torch

SEED, STEPS = 5, 6


def twins_pictures(pipeline, *args, **kwargs):
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(*args, num_inference_steps=STEPS, output_type="np", **kwargs).images
    return np.rint(images * 255.0).astype(np.float64)


def assert_same_pictures(ours, expected):
    assert expected.std(axis=(1, 2, 3)).min() > 15
    assert ((expected > 0) & (expected < 255)).mean() > 0.5
    error = np.square(ours - expected).mean(axis=(1, 2, 3)).max()
    assert (10 * math.log10(255**2 / error) if error else math.inf) >= 60


def generators(count):
    return [torch.Generator().manual_seed(SEED + index) for index in range(count)]
