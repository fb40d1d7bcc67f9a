import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ldm_runtime.errors import LdmError
from ldm_runtime.images import decode_latents, read_metadata, save_png, to_uint8
from ldm_runtime.testing import TINY_SPEC, FakeEngine

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


def test_metadata_of_any_text_survives_a_file(tmp_path):
    metadata = {"request": {"prompt": "ein Kreis, 赤い円 \0 \n 🟥", "seed": 2**64 - 1}}

    save_png(PICTURE, tmp_path / "a.png", metadata)

    assert read_metadata(tmp_path / "a.png") == metadata
    with Image.open(tmp_path / "a.png") as image:
        assert image.tobytes() == PICTURE.tobytes()


def test_a_file_is_never_replaced(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("mine")

    with pytest.raises(FileExistsError):
        save_png(PICTURE, path, {})

    assert path.read_text() == "mine"
    assert [each.name for each in tmp_path.iterdir()] == ["a.png"]


def test_a_picture_that_fails_to_encode_leaves_nothing(tmp_path):
    class Unwritable:
        def save(self, file, **options):
            file.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_png(Unwritable(), tmp_path / "a.png", {})

    assert not list(tmp_path.iterdir())


def test_a_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()

    save_png(PICTURE, tmp_path / "a.png", {})

    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", None])
def test_what_is_no_png_is_one_sentence(tmp_path, content):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(LdmError, match=r"a\.png cannot be read as a PNG"):
        read_metadata(path)


def test_a_picture_of_somebody_else_is_one_sentence(tmp_path):
    PICTURE.save(tmp_path / "a.png")

    with pytest.raises(LdmError, match="carries no 'ldm-deploy' metadata"):
        read_metadata(tmp_path / "a.png")


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_damaged_metadata_is_one_sentence(tmp_path, text):
    info = PngImagePlugin.PngInfo()
    info.add_text("ldm-deploy", text)
    PICTURE.save(tmp_path / "a.png", pnginfo=info)

    with pytest.raises(LdmError, match="metadata is damaged"):
        read_metadata(tmp_path / "a.png")
