import base64
import io
import re
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm_runtime.inputs.images import InputImage
from ldm_runtime.inputs.reading import MAX_SIDE

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)
#: Large areas, so that lossy formats keep them.
FLAT = np.repeat(np.repeat(PIXELS[:2, :2], 32, axis=0), 32, axis=1)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def png_that_claims(width, height):
    """A PNG of a few bytes whose header claims a size, with one row of data."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def one_sentence(value):
    """Read what is not an image and return the reason."""
    with pytest.raises(ValueError, match=r"^[^\n]{1,500}$") as caught:
        InputImage.read(value)
    return str(caught.value)


# --- what is read ---------------------------------------------------------------------------------


def test_a_path_bytes_an_image_an_array_and_a_url_are_the_same_picture(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(IMAGE))
    url = f"data:image/png;base64,{base64.b64encode(encoded(IMAGE)).decode()}"

    read = [
        InputImage.read(value) for value in (path, str(path), encoded(IMAGE), IMAGE, PIXELS, url)
    ]

    assert len(set(read)) == 1
    np.testing.assert_array_equal(read[0].pixels, PIXELS)
    assert [each.source for each in read] == [str(path), str(path), None, None, None, None]
    assert InputImage.read(read[0]) is read[0]


def test_base64_may_be_broken_into_lines():
    url = f"DATA:image/png;BASE64,{base64.encodebytes(encoded(IMAGE)).decode()}"

    assert InputImage.read(url) == InputImage(PIXELS)


@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True}), ("WEBP", {}), ("JPEG", {})],
)
def test_common_formats_are_read_whatever_the_name_says(tmp_path, format, options):
    path = tmp_path / "picture.txt"
    path.write_bytes(encoded(Image.fromarray(FLAT), format, **options))

    pixels = InputImage.read(path).pixels.astype(int)

    assert pixels.shape == FLAT.shape
    inner = np.s_[8:24, 8:24]
    assert abs(pixels[inner] - FLAT[inner]).max() <= (
        8 if not options and format in {"WEBP", "JPEG"} else 0
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_held_sideways_makes_an_upright_picture(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2),
        6: np.rot90(PIXELS, -1),
        7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PIXELS),
    }

    picture = InputImage.read(encoded(IMAGE, exif=exif))

    np.testing.assert_array_equal(picture.pixels, upright[orientation])


def exif_with(tag, kind, value):
    """EXIF data in TIFF's bytes: held sideways, and one more entry of any type."""
    entries = [(0x0112, 3, struct.pack("<I", 6)), (tag, kind, value)]
    end = 8 + 2 + 12 * len(entries) + 4
    packed = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries))
    for each, form, content in entries:
        place = content.ljust(4, b"\0") if len(content) <= 4 else struct.pack("<I", end)
        packed += struct.pack("<HHI4s", each, form, 1, place)
    return packed + struct.pack("<I", 0) + value


SIZES_OF_TYPES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 16: 8}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about some of them
@pytest.mark.parametrize("kind", [*SIZES_OF_TYPES, 99])
@pytest.mark.parametrize("tag", [0x010F, 0x011A, 0x0131, 0x0132, 0x0103, 0x8769, 0x8825])
def test_an_odd_exif_entry_does_not_keep_a_picture_from_being_turned(tag, kind):
    for byte in (0, 1, 255):
        exif = exif_with(tag, kind, bytes([byte]) * SIZES_OF_TYPES.get(kind, 4))

        picture = InputImage.read(encoded(IMAGE, exif=exif))

        np.testing.assert_array_equal(picture.pixels, np.rot90(PIXELS, -1))


def test_damaged_exif_data_are_one_sentence():
    damaged = encoded(IMAGE, exif=b"Exif\0\0XX*\0\x08\0\0\0")

    with pytest.raises(
        ValueError, match=r"^the data has damaged EXIF data \(not a TIFF.*; save it"
    ):
        InputImage.read(damaged)


def test_what_is_transparent_is_laid_on_white():
    alpha = np.zeros((6, 9, 1), dtype=np.uint8)
    alpha[:, 3:6], alpha[:, 6:] = 51, 255

    picture = InputImage.read(np.concatenate([PIXELS, alpha], axis=2))

    assert (picture.pixels[:, :3] == 255).all()
    mixed = 255 + 0.2 * (PIXELS[:, 3:6].astype(float) - 255)
    np.testing.assert_allclose(picture.pixels[:, 3:6], mixed, atol=1)
    np.testing.assert_array_equal(picture.pixels[:, 6:], PIXELS[:, 6:])


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_every_kind_of_transparency_is_seen(mode):
    image = Image.new("RGBA", (4, 4), (10, 10, 10, 0))
    image.paste((10, 10, 10, 255), (2, 0, 4, 4))

    pixels = InputImage.read(encoded(image.convert(mode))).pixels

    assert (pixels[:, :2] == 255).all()
    assert (pixels[:, 2:] == 10).all()


def test_a_colour_that_a_png_declares_transparent_is_white():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (4, 5, 6))

    picture = InputImage.read(encoded(image, transparency=(1, 2, 3)))

    assert picture.pixels.tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_palettes_gray_and_bitmaps_become_rgb():
    gray = IMAGE.convert("L")
    black_and_white = Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1")
    palette = IMAGE.quantize(256)  # 54 pixels fit, so it is exact

    assert InputImage.read(encoded(palette)) == InputImage(PIXELS)
    assert (InputImage.read(encoded(gray)).pixels == np.asarray(gray)[..., None]).all()
    assert InputImage.read(np.asarray(gray)) == InputImage.read(gray)
    assert InputImage.read(encoded(black_and_white)).pixels[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("orientation", [1, 6])
def test_sixteen_bits_are_scaled_and_not_clipped(orientation):
    levels = np.array([[0, 128, 129, 257, 32896, 65406, 65535]], dtype=np.uint16)
    exif = Image.Exif()
    exif[0x0112] = orientation

    picture = InputImage.read(encoded(Image.fromarray(levels), exif=exif))

    assert picture.gray().ravel().tolist() == [0, 0, 1, 1, 128, 254, 255]


def test_printed_colours_become_rgb():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))

    pixels = InputImage.read(encoded(image, "JPEG", quality=100)).pixels

    assert abs(pixels.astype(int) - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_an_animation_is_its_first_frame(format):
    frames = [Image.fromarray(FLAT[::-1]), Image.new("RGB", (64, 64), "red")]
    data = encoded(
        Image.fromarray(FLAT), format, save_all=True, append_images=frames, lossless=True
    )

    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    assert InputImage.read(data) == InputImage(FLAT)


# --- what a picture is ----------------------------------------------------------------------------


def test_its_png_holds_its_pixels_and_nothing_else():
    exif = Image.Exif()
    exif[0x010E] = "secret"
    picture = InputImage.read(encoded(IMAGE, exif=exif))

    data = picture.to_png_bytes()

    assert InputImage.read(data) == picture
    assert b"secret" not in data
    assert data == InputImage(PIXELS).to_png_bytes()


def test_gray_is_the_brightness_and_that_of_gray_is_itself():
    ramp = np.arange(256, dtype=np.uint8)[None]
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], dtype=np.uint8)

    np.testing.assert_array_equal(InputImage.read(ramp).gray(), ramp)
    assert InputImage(colours).gray().tolist() == [[76, 150, 29]]  # 0.299, 0.587, 0.114


def test_it_shows_itself_in_one_short_line():
    picture = InputImage(PIXELS, source="a.png")

    assert repr(picture) == f"InputImage(9x6, sha256 {picture.sha256[:12]}, 'a.png')"
    assert picture.size == (9, 6)


# --- what is no picture ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (7, "7 is not an image; give a path, a data: URL"),
        (None, "None is not an image"),
        (b"", "the data is not a readable image; give PNG, JPEG, WebP or BMP"),
        (b"hello", "the data is not a readable image"),
        ("missing.png", "missing.png cannot be read: No such file or directory"),
        ("", r" cannot be read: "),
        ("a\0b", "cannot be read: embedded null byte"),
        ("A" * 5000, "cannot be read: File name too long"),
        ("data:image/png,abc", "is not a data: URL in base64; write data:image/png;base64,…"),
        ("data:image/png;base64,a*b", "is not valid base64"),
        ("data:image/png;base64,ä", "is not valid base64"),
        ("data:image/png;base64,aGVsbG8=", "the data: URL is not a readable image"),
        (
            PIXELS.astype(np.float32),
            "an array of float32 is not an image; give uint8, from 0 to 255",
        ),
        (PIXELS.transpose(2, 0, 1), r"an array of shape \(3, 6, 9\) is not an image"),
        (PIXELS[..., :1], r"an array of shape \(6, 9, 1\) is not an image"),
        (np.zeros(3, np.uint8), r"an array of shape \(3,\) is not an image"),
        (np.zeros((0, 4, 3), np.uint8), "the array has 4x0 pixels; both sides must lie between 1"),
        (np.zeros((1, MAX_SIDE + 1), np.uint8), "the array has 16385x1 pixels"),
        (Image.new("RGB", (0, 5)), "the image has 0x5 pixels"),
        (Image.new("F", (5, 5)), "the image has mode 'F', whose range is not known"),
        (Image.new("La", (5, 5)), "the image cannot be converted to RGB"),
    ],
)
def test_what_is_no_picture_is_one_sentence(value, reason):
    assert re.search(reason, one_sentence(value))


def test_a_folder_is_one_sentence(tmp_path):
    assert "Is a directory" in one_sentence(tmp_path)


def test_a_long_path_is_shown_to_its_end(tmp_path):
    path = tmp_path / ("long" * 20 + ".png")

    assert path.name in one_sentence(path)


@pytest.mark.parametrize("format", ["TIFF", "GIF", "ICO", "PPM"])
def test_rare_formats_are_refused_and_the_common_ones_named(format):
    assert "give PNG, JPEG, WebP or BMP" in one_sentence(encoded(IMAGE, format))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_file_that_is_cut_off_is_one_sentence(format):
    data = encoded(Image.fromarray(np.tile(PIXELS, (20, 20, 1))), format)

    reason = one_sentence(data[: len(data) // 2])

    assert "damaged or cut off" in reason or "is not a readable image" in reason


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (MAX_SIDE + 1, 1, "the data has 16385x1 pixels; both sides must lie between 1 and 16384"),
        (8193, 8192, "the data has more than 67108864 pixels; make it smaller"),
        (10_000, 10_000, "more than 67108864 pixels"),  # where Pillow warns
        (2**31 - 1, 2**31 - 1, "more than 67108864 pixels"),  # where Pillow refuses
    ],
)
@pytest.mark.parametrize("action", ["error", "ignore"])
def test_a_few_bytes_that_claim_to_be_huge_are_refused_unread(width, height, reason, action):
    with warnings.catch_warnings():
        warnings.simplefilter(action)

        assert reason in one_sentence(png_that_claims(width, height))


def test_a_picture_made_directly_is_checked_too():
    for array in (PIXELS[..., :2], PIXELS.astype(np.uint16), PIXELS[0]):
        with pytest.raises(ValueError, match=r"is not an RGB image; give uint8"):
            InputImage(array)


SPOILT = [
    encoded(
        IMAGE.quantize(8),
        transparency=0,
        exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0",
    ),
    encoded(IMAGE, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"),
    encoded(IMAGE, "WEBP"),
    encoded(IMAGE.convert("P"), "BMP"),
]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_spoilt_file_is_a_picture_or_one_sentence(data):
    file = bytearray(data.draw(st.sampled_from(SPOILT)))
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged EXIF data
        try:
            picture = InputImage.read(bytes(file))
        except ValueError:
            return

    assert picture.pixels.dtype == np.uint8


def progressive(scans):
    """A progressive JPEG of 8x8 gray pixels whose last scan is repeated up to that many."""
    file = io.BytesIO()
    Image.new("L", (8, 8), 128).save(file, format="JPEG", progressive=True)
    data = file.getvalue().removesuffix(b"\xff\xd9")
    last = data[data.rindex(b"\xff\xda") :]
    return data + last * (scans - data.count(b"\xff\xda")) + b"\xff\xd9"


def test_a_jpeg_of_more_scans_than_any_editor_writes_is_refused_before_it_is_decoded():
    assert InputImage.read(progressive(100)).size == (8, 8)

    start = time.process_time()
    with pytest.raises(ValueError, match="has more than 100 scans; save it again"):
        InputImage.read(progressive(20_000))
    assert time.process_time() - start < 2
