import base64
import io
import re
import struct
import warnings
import zlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm_runtime.inputs.images import InputImage
from ldm_runtime.inputs.reading import MAX_SIDE
from ldm_runtime.inputs.segmentation import SegmentationMap

IDS = np.random.default_rng(0).integers(0, 182, (6, 9), dtype=np.uint8)
GRAY = Image.fromarray(IDS)
PALETTE = Image.fromarray(IDS)
PALETTE.putpalette([255 - i // 3 for i in range(768)])


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def png(rows, bits, kind, width, height):
    """A PNG written by hand: gray (kind 0) or with a palette (3), of any number of bits."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(3 * 2**bits)) if kind == 3 else b""
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            palette,
            chunk(b"IDAT", data),
            chunk(b"IEND", b""),
        ]
    )


def one_sentence(value):
    """Read what is not a segmentation map and return the reason."""
    with pytest.raises(ValueError, match=r"^[^\n]{1,500}$") as caught:
        SegmentationMap.read(value)
    return str(caught.value)


# --- what is read ---------------------------------------------------------------------------------


def test_a_path_bytes_an_image_an_array_and_a_url_are_the_same_map(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(GRAY))
    url = f"data:image/png;base64,{base64.b64encode(encoded(GRAY)).decode()}"

    values = (path, str(path), encoded(GRAY), bytearray(encoded(GRAY)), GRAY, IDS, url)
    read = [SegmentationMap.read(value) for value in values]

    assert len(set(read)) == 1
    np.testing.assert_array_equal(read[0].ids, IDS)
    assert [each.source for each in read] == [str(path), str(path), *[None] * 5]
    assert SegmentationMap.read(read[0]) is read[0]


def test_a_palette_gives_its_places_and_not_its_colours():
    transparent = encoded(PALETTE, transparency=int(IDS[0, 0]))

    assert SegmentationMap.read(encoded(PALETTE)) == SegmentationMap(IDS)
    assert SegmentationMap.read(PALETTE) == SegmentationMap(IDS)
    assert SegmentationMap.read(transparent) == SegmentationMap(IDS)
    assert (
        InputImage.read(PALETTE).pixels[..., 0] == 255 - IDS
    ).all()  # where colours are asked for


@pytest.mark.parametrize("kind", [0, 3], ids=["gray", "palette"])
@pytest.mark.parametrize(
    ("bits", "row", "ids"),
    [
        (1, b"\x50", [0, 1, 0, 1]),
        (2, b"\x1b", [0, 1, 2, 3]),
        (4, b"\x0f\x37", [0, 15, 3, 7]),
        (8, b"\x00\x01\x7f\xff", [0, 1, 127, 255]),
    ],
)
def test_small_numbers_of_bits_are_not_spread_over_a_byte(kind, bits, row, ids):
    data = png([row, row[::-1]], bits, kind, 4, 2)

    read = SegmentationMap.read(data).ids

    assert read[0].tolist() == ids
    assert read.shape == (2, 4)
    with Image.open(io.BytesIO(data)) as opened:
        assert SegmentationMap.read(opened) == SegmentationMap.read(data)


def test_sixteen_bits_are_read_as_they_are_if_they_hold_classes():
    data = encoded(Image.fromarray(IDS.astype(np.uint16)))

    assert SegmentationMap.read(data) == SegmentationMap(IDS)
    assert "has a pixel of class 256; classes lie between 0 and 255" in one_sentence(
        encoded(Image.fromarray(np.array([[256, 0]], dtype=np.uint16)))
    )


def test_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6

    assert SegmentationMap.read(encoded(GRAY, exif=exif)) == SegmentationMap(IDS)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64, np.uint64, ">i2"])
def test_arrays_of_any_integers_are_read(dtype):
    ids = np.array([[0, 1, 127]], dtype=dtype)

    read = SegmentationMap.read(ids)

    assert read.ids.dtype == np.uint8
    assert read.ids.tolist() == [[0, 1, 127]]


# --- what a map is --------------------------------------------------------------------------------


def test_it_shows_itself_in_one_short_line():
    classes = SegmentationMap(IDS, source="a.png")

    assert repr(classes) == f"SegmentationMap(9x6, sha256 {classes.sha256[:12]}, 'a.png')"
    assert classes.size == (9, 6)


# --- other sizes ----------------------------------------------------------------------------------


def test_a_larger_map_repeats_pixels_and_a_smaller_one_takes_those_at_the_centres():
    classes = SegmentationMap(np.arange(12).reshape(3, 4))

    larger = classes.resized(8, 6)

    np.testing.assert_array_equal(larger.ids, np.kron(classes.ids, np.ones((2, 2), np.uint8)))
    assert larger.resized(4, 3) == classes
    # Centres of two columns of four lie on the lines before columns 1 and 3, that of one row in 1.
    assert classes.resized(2, 1).ids.tolist() == [[5, 7]]
    assert classes.resized(3, 3).ids[0].tolist() == [0, 2, 3]  # at 0.67, 2 and 3.33
    assert classes.resized(4, 3) is classes


@given(st.integers(1, 40), st.integers(1, 40))
def test_a_new_pixel_has_the_class_of_the_one_its_centre_lies_in(old, new):
    classes = SegmentationMap(np.arange(old)[None])

    columns = classes.resized(new, 1).ids[0].tolist()

    for column, chosen in enumerate(columns):
        centre = Fraction(2 * column + 1, 2 * new) * old
        assert chosen <= centre < chosen + 1
    assert classes.resized(old, new).ids.tolist() == classes.ids.tolist() * new


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (MAX_SIDE + 1, 1)])
def test_sizes_beyond_the_limits_are_refused(size):
    with pytest.raises(ValueError, match=r"the result has .* pixels; both sides must lie between"):
        SegmentationMap(IDS).resized(*size)


# --- what is no map -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (
            7,
            "7 is not a segmentation map; give a path, a data: URL, the bytes of a file, "
            "a PIL image or",
        ),
        (None, "None is not a segmentation map"),
        (InputImage(np.zeros((2, 2, 3), np.uint8)), r"InputImage\(2x2.* is not a segmentation map"),
        (b"", "the data is not a PNG; a segmentation map is a gray or palette PNG"),
        (encoded(GRAY, "BMP"), "the data is not a PNG"),
        (encoded(GRAY.convert("RGB"), "JPEG"), "the data is not a PNG"),
        (encoded(GRAY.convert("RGB")), "the data has mode 'RGB', whose pixels are not class num"),
        (encoded(GRAY.convert("LA")), "the data has mode 'LA'.*save it as a gray or palette PNG"),
        (GRAY.convert("RGBA"), "the image has mode 'RGBA'"),
        (GRAY.convert("F"), "the image has mode 'F'"),
        ("missing.png", "missing.png cannot be read: No such file or directory"),
        ("a\0b", "cannot be read: embedded null byte"),
        ("data:image/png,abc", "is not a data: URL in base64"),
        (
            IDS.astype(np.float32),
            r"an array of float32 and shape \(6, 9\) is not a segmentation map",
        ),
        (IDS > 3, "an array of bool"),
        (
            IDS[..., None],
            r"shape \(6, 9, 1\) is not a segmentation map; give integers \(height, width\)",
        ),
        (np.array([[0, 256]]), "the array has a pixel of class 256; classes lie between 0 and 255"),
        (np.array([[0, -1]]), "the array has a pixel of class -1"),
        (
            np.zeros((0, 4), int),
            "the array has 4x0 pixels; both sides must lie between 1 and 16384",
        ),
        (np.zeros((1, MAX_SIDE + 1), int), "the array has 16385x1 pixels"),
    ],
)
def test_what_is_no_map_is_one_sentence(value, reason):
    assert re.search(reason, one_sentence(value))


def test_a_folder_is_one_sentence(tmp_path):
    assert "Is a directory" in one_sentence(tmp_path)


def test_a_file_that_is_cut_off_is_one_sentence():
    data = encoded(Image.fromarray(np.tile(IDS, (20, 20))))

    assert "the data is damaged or cut off" in one_sentence(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (MAX_SIDE + 1, 1, "the data has 16385x1 pixels; both sides must lie between 1 and 16384"),
        (8193, 8192, "the data has more than 67108864 pixels; make it smaller"),
        (2**31 - 1, 2**31 - 1, "more than 67108864 pixels"),
    ],
)
@pytest.mark.parametrize("action", ["error", "ignore"])
def test_a_few_bytes_that_claim_to_be_huge_are_refused_unread(width, height, reason, action):
    with warnings.catch_warnings():
        warnings.simplefilter(action)

        assert reason in one_sentence(png([], 8, 0, width, height))


SPOILT = [encoded(GRAY), encoded(PALETTE, transparency=0), png([b"\x1b"], 2, 0, 4, 1)]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_spoilt_file_is_a_map_or_one_sentence(data):
    file = bytearray(data.draw(st.sampled_from(SPOILT)))
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            classes = SegmentationMap.read(bytes(file))
        except ValueError:
            return

    assert classes.ids.dtype == np.uint8
