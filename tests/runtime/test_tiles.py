import numpy as np
import pytest

from ldm_runtime.tiling.tiles import MIN_TILE, decode_tiled, tile_starts

RNG = np.random.default_rng(0)


def latents_of(height, width, batch=1):
    return RNG.standard_normal((batch, 4, height, width)).astype(np.float32)


class Decoder:
    """Enlarges by `factor`, channel by channel; what it shows depends on the pixel alone."""

    def __init__(self, factor, offset=lambda part: 0.0):
        self.factor, self.offset, self.shapes = factor, offset, []

    def __call__(self, part):
        self.shapes.append(part.shape)
        assert part.flags.c_contiguous
        return np.kron(part[:, :3], np.ones((self.factor,) * 2, np.float32)) + self.offset(part)


@pytest.mark.parametrize("overlap", [None, 0, 1, 4])
@pytest.mark.parametrize("factor", [1, 4])
@pytest.mark.parametrize(
    ("height", "width"), [(8, 8), (9, 8), (16, 33), (3, 40), (1, 1), (17, 5), (24, 23)]
)
def test_a_decoder_that_sees_single_pixels_gives_the_same_picture(height, width, factor, overlap):
    latents, decoder = latents_of(height, width, batch=2), Decoder(factor)

    pictures = decode_tiled(decoder, latents, factor, 8, overlap)

    assert pictures.dtype == np.float32
    np.testing.assert_allclose(pictures, Decoder(factor)(latents), rtol=0, atol=2e-6)


def test_every_call_decodes_one_image_and_one_full_tile():
    decoder = Decoder(2)

    decode_tiled(decoder, latents_of(33, 70, batch=3), 2, 16)

    assert set(decoder.shapes) == {(1, 4, 16, 16)}
    assert len(decoder.shapes) == 3 * 3 * 6


def test_a_tile_is_never_larger_than_what_there_is():
    decoder = Decoder(2)

    decode_tiled(decoder, latents_of(9, 40), 2, 16)

    assert set(decoder.shapes) == {(1, 4, 9, 16)}


@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (8, 2), (8, 4), (13, 3)])
def test_tiles_lie_inside_cover_everything_and_overlap_enough(tile, overlap):
    for length in range(1, 200):
        starts = tile_starts(length, tile, overlap)

        ends = [start + min(tile, length) for start in starts]
        assert (starts[0], ends[-1]) == (0, length)
        shared = [end - start for end, start in zip(ends[:-1], starts[1:], strict=True)]
        assert all(each >= overlap for each in shared)
        assert max(shared, default=0) - min(shared, default=0) <= 1
        needed = -(-(length - overlap) // (tile - overlap))  # rounded up
        assert len(starts) == max(needed, 1)


def brightness_steps(overlap):
    """Steps between neighbouring columns, where each tile is brighter than the one before."""
    seen = []

    def brighter_each_time(part):
        seen.append(part)
        return np.float32(len(seen))

    flat = np.zeros((1, 4, 8, 22), dtype=np.float32)
    picture = decode_tiled(Decoder(4, brighter_each_time), flat, 4, 8, overlap)
    assert len(seen) >= 3
    assert picture.min() >= 1
    assert picture.max() <= len(seen)
    return np.diff(picture[0, 0, 0])


def test_tiles_that_differ_are_faded_into_each_other():
    steps = brightness_steps(overlap=2)

    assert steps.min() >= -1e-6  # brighter and brighter
    assert steps.max() <= 0.15  # eight pixels of overlap, so about an eighth at a time
    assert brightness_steps(overlap=0).max() >= 0.45


def test_images_of_a_batch_do_not_touch_each_other():
    latents = latents_of(12, 20, batch=3)

    def mean_brightness(part):  # depends on all that a tile sees, as normalisation does
        return part.mean()

    together = decode_tiled(Decoder(2, mean_brightness), latents, 2, 8)
    alone = [decode_tiled(Decoder(2, mean_brightness), each[None], 2, 8) for each in latents]

    np.testing.assert_array_equal(together, np.concatenate(alone))


def test_tiles_that_are_too_small_or_overlap_too_much_are_one_sentence():
    latents = latents_of(32, 32)

    with pytest.raises(ValueError, match=f"7 latent pixels is too small; give at least {MIN_TILE}"):
        decode_tiled(Decoder(2), latents, 2, 7)
    for overlap in (-1, 5):
        with pytest.raises(ValueError, match=f"overlap of {overlap} .* tile of 8; give 0 to 4"):
            decode_tiled(Decoder(2), latents, 2, 8, overlap)
