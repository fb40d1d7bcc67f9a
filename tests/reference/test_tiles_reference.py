"""A real decoder, in tiles and as a whole: the promise of 45 dB, and how much it sees at a time.

The decoder is that of the shapes model, in torch. Its pictures here are 25 times as large as those
it was trained on, one scene beside the other on one background, as sampling beyond the trained size
would draw them; the whole decodes such pictures as well as it does small ones, which is checked.
"""

from pathlib import Path

import numpy as np
import pytest

from ldm_export.checkpoint.checkpoint import open_checkpoint
from ldm_export.detection.detect import detect
from ldm_export.graphs.torch_engine import TorchEngine
from ldm_export.networks.loading import load_network
from ldm_runtime.diagnostics.measures import psnr
from ldm_runtime.latents.codec import decode_latents, encode_image
from ldm_runtime.testing import FakeEngine
from tiles import large_scene

CHECKPOINT = Path(__file__).parents[2] / "models/shapes/shapes.ckpt"
SIDE = 5  # scenes
TILE = 192

pytestmark = [pytest.mark.reference, pytest.mark.slow]


@pytest.fixture(scope="module")
def autoencoder():
    """The model's spec, encoder and decoder."""
    with open_checkpoint(CHECKPOINT) as checkpoint:
        detection = detect(checkpoint.tensors)
        engines = [
            TorchEngine(
                name,
                load_network(
                    name,
                    detection.spec,
                    {
                        parameter: checkpoint.tensors[tensor]
                        for parameter, tensor in detection.weights[name].items()
                    },
                ),
            )
            for name in ("vae_encoder", "vae_decoder")
        ]
    return detection.spec, *engines


def test_a_large_picture_in_tiles_is_within_45_db_of_the_whole(autoencoder):
    spec, encoder, decoder = autoencoder
    counting = FakeEngine(decoder.run)
    original = large_scene(SIDE, "gray", gradient=False)
    latents = encode_image(encoder, original[None], spec)

    (whole,) = decode_latents(decoder, latents, spec)
    (tiled,) = decode_latents(counting, latents, spec, tile_size=TILE)

    side = TILE // spec.autoencoder.factor
    assert {call["latents"].shape for call in counting.calls} == {(1, latents.shape[1], side, side)}
    assert len(counting.calls) == 4
    assert psnr(np.asarray(whole), original) >= 30
    assert psnr(np.asarray(tiled), np.asarray(whole)) >= 45
