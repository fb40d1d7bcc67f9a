import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ldm_runtime.errors import LdmError
from ldm_runtime.inputs.images import InputImage, resize
from ldm_runtime.latents.codec import decode_latents, encode_image, to_uint8
from ldm_runtime.pipeline.image_files import read_metadata, save_image
from ldm_runtime.testing import TINY_SPEC, FakeEngine, tiny_networks

RNG = np.random.default_rng(0)
PICTURE = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))


def test_pixels_are_rounded_and_clipped_and_channels_come_last():
    levels = np.array([0, 1, 127, 128, 254, 255], dtype=np.float32) / 255 * 2 - 1
    values = np.concatenate([levels + 0.0035, levels - 0.0035, [-9, 9]]).astype(np.float32)
    image = np.stack([values, -values, values])[None, :, None, :]

    pixels = to_uint8(image)

    assert pixels.shape == (1, 1, 14, 3)
    assert pixels.dtype == np.uint8
    expected = [0, 1, 127, 128, 254, 255] * 2 + [0, 255]
    assert pixels[0, 0, :, 0].tolist() == pixels[0, 0, :, 2].tolist() == expected
    assert pixels[0, 0, :, 1].tolist() == [255 - level for level in expected]


def test_latents_leave_the_unets_scale_before_they_are_decoded():
    engine = FakeEngine(lambda inputs: {"image": np.zeros((1, 3, 4, 4), dtype=np.float32)})
    latents = np.ones((1, 4, 2, 2), dtype=np.float32)

    (image,) = decode_latents(engine, latents, TINY_SPEC)

    np.testing.assert_array_equal(engine.calls[0]["latents"], latents / 0.5)
    assert engine.calls[0]["latents"].dtype == np.float32
    assert image.size == (4, 4)


@pytest.mark.parametrize("batch", [1, 3])
def test_tiles_hold_one_image_and_give_the_same_pictures(batch):
    decoder = tiny_networks()["vae_decoder"]  # its convolution is 1x1, so that tiles are exact
    engine = FakeEngine(decoder)
    latents = RNG.standard_normal((batch, 4, 20, 33)).astype(np.float32)

    tiled = decode_latents(engine, latents, TINY_SPEC, tile_size=16)

    whole = decode_latents(FakeEngine(decoder), latents, TINY_SPEC)
    assert {call["latents"].shape for call in engine.calls} == {(1, 4, 8, 8)}
    assert [each.size for each in tiled] == [(66, 40)] * batch
    for a, b in zip(tiled, whole, strict=True):
        assert abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1


def test_without_a_tile_size_the_batch_is_decoded_at_once():
    engine = FakeEngine(tiny_networks()["vae_decoder"])

    decode_latents(engine, np.zeros((3, 4, 20, 33), dtype=np.float32), TINY_SPEC)

    assert [call["latents"].shape for call in engine.calls] == [(3, 4, 20, 33)]


@pytest.mark.parametrize(
    ("tile_size", "message"),
    [(33, "tile_size 33 is not a multiple of 2"), (2, "too small"), (-16, "too small")],
)
def test_a_tile_size_that_cannot_be_is_one_sentence(tile_size, message):
    engine = FakeEngine(tiny_networks()["vae_decoder"])

    with pytest.raises(ValueError, match=message):
        decode_latents(engine, np.zeros((1, 4, 8, 8), np.float32), TINY_SPEC, tile_size=tile_size)


def test_a_picture_is_encoded_as_the_mean_in_the_unets_scale():
    moments = RNG.standard_normal((2, 8, 3, 4)).astype(np.float32)
    engine = FakeEngine(lambda inputs: {"moments": moments})
    pixels = RNG.integers(0, 256, (2, 6, 8, 3), dtype=np.uint8)

    latents = encode_image(engine, pixels, TINY_SPEC)

    assert latents.dtype == np.float32
    np.testing.assert_array_equal(latents, moments[:, :4] * 0.5)
    (call,) = engine.calls
    assert call["image"].dtype == np.float32
    assert call["image"].flags.c_contiguous
    np.testing.assert_array_equal(to_uint8(call["image"]), pixels)


def test_black_is_minus_one_and_white_is_one_and_every_level_comes_back():
    engine = FakeEngine(tiny_networks()["vae_encoder"])
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)

    encode_image(engine, levels, TINY_SPEC)

    image = engine.calls[0]["image"]
    assert (image.min(), image.max()) == (-1, 1)
    np.testing.assert_array_equal(to_uint8(image), levels)


@pytest.mark.parametrize(("width", "height"), [(7, 8), (8, 7)])
def test_a_picture_that_latents_cannot_cover_is_one_sentence(width, height):
    engine = FakeEngine(tiny_networks()["vae_encoder"])

    with pytest.raises(
        ValueError, match=f"{width}x{height} pixels; make both sides multiples of 2"
    ):
        encode_image(engine, np.zeros((1, height, width, 3), dtype=np.uint8), TINY_SPEC)


def test_a_picture_of_the_right_size_is_not_touched():
    picture = InputImage(np.asarray(PICTURE))

    assert resize(picture, 4, 4) is picture


def test_a_picture_is_resized_to_width_and_height_with_a_smooth_filter():
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    picture = InputImage.read(np.tile(ramp, (8, 1)))

    smaller = resize(picture, 16, 4)

    assert smaller.size == (16, 4)
    block_means = ramp.reshape(16, 4).mean(axis=1)
    np.testing.assert_allclose(smaller.gray()[0], block_means, atol=3)
    checkers = InputImage.read(np.indices((32, 32)).sum(axis=0).astype(np.uint8) % 2 * 255)
    inner = resize(checkers, 8, 8).gray()[1:-1, 1:-1]
    np.testing.assert_allclose(inner, 127.5, atol=4)  # gray: every pixel counts


def test_metadata_of_any_text_survives_a_file(tmp_path):
    metadata = {"request": {"prompt": "ein Kreis, 赤い円 \0 \n 🟥", "seed": 2**64 - 1}}

    save_image(PICTURE, tmp_path / "a.png", metadata)

    assert read_metadata(tmp_path / "a.png") == metadata
    with Image.open(tmp_path / "a.png") as image:
        assert image.tobytes() == PICTURE.tobytes()


def test_a_file_is_never_replaced(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("mine")

    with pytest.raises(FileExistsError):
        save_image(PICTURE, path, {})

    assert path.read_text() == "mine"
    assert [each.name for each in tmp_path.iterdir()] == ["a.png"]


def test_a_picture_that_fails_to_encode_leaves_nothing(tmp_path):
    class Unwritable:
        def save(self, file, **options):
            file.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_image(Unwritable(), tmp_path / "a.png", {})

    assert not list(tmp_path.iterdir())


def test_a_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()

    save_image(PICTURE, tmp_path / "a.png", {})

    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", None])
def test_what_is_no_png_is_one_sentence(tmp_path, content):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(LdmError, match=r"a\.png cannot be read as PNG, JPEG or WebP"):
        read_metadata(path)


def test_a_picture_of_somebody_else_is_one_sentence(tmp_path):
    PICTURE.save(tmp_path / "a.png")

    with pytest.raises(LdmError, match="carries no 'ldm-deploy' metadata"):
        read_metadata(tmp_path / "a.png")


@pytest.mark.parametrize("text", ["{", "[1]", '{"a":' + "[" * 10**5])
def test_damaged_metadata_is_one_sentence(tmp_path, text):
    info = PngImagePlugin.PngInfo()
    info.add_text("ldm-deploy", text)
    PICTURE.save(tmp_path / "a.png", pnginfo=info)

    with pytest.raises(LdmError, match="metadata is damaged"):
        read_metadata(tmp_path / "a.png")
