import base64
import io
import re
import struct
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_runtime.inputs.embeddings import MAX_VECTORS, MAX_WIDTH, Embeddings

VECTORS = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npy_that_claims(shape, descr="<f4", data=b"", version=(1, 0)):
    """A .npy file whose header claims a shape and a type."""
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}}}\n".encode()
    length = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + length + header + data


def one_sentence(value):
    """Read what holds no embeddings and return the reason."""
    with pytest.raises(ValueError, match=r"^[^\n]{1,500}$") as caught:
        Embeddings.read(value)
    return str(caught.value)


# --- what is read ---------------------------------------------------------------------------------


def test_a_path_bytes_an_array_and_a_url_are_the_same_embeddings(tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(npy(VECTORS))
    url = f"data:application/octet-stream;base64,{base64.b64encode(npy(VECTORS)).decode()}"

    values = (path, str(path), npy(VECTORS), memoryview(npy(VECTORS)), VECTORS, url)
    read = [Embeddings.read(value) for value in values]

    assert len(set(read)) == 1
    np.testing.assert_array_equal(read[0].values, VECTORS)
    assert read[0].values.dtype == np.float32
    assert [each.source for each in read] == [str(path), str(path), *[None] * 4]
    assert Embeddings.read(read[0]) is read[0]


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_any_floating_point_type_and_order_become_float32(dtype, order):
    array = np.array([[0.5, 1.25, -3.0], [65504.0, 0.0, 2.0**-14]], dtype=dtype, order=order)

    for read in (Embeddings.read(array), Embeddings.read(npy(array))):
        assert read.values.dtype == np.dtype("<f4")
        np.testing.assert_array_equal(read.values, array.astype(np.float64))
        assert read.values.flags.c_contiguous


def test_both_versions_of_the_header_are_read():
    data = VECTORS.tobytes()

    for version in ((1, 0), (2, 0)):
        assert Embeddings.read(npy_that_claims((3, 8), "<f4", data, version)) == Embeddings(VECTORS)


# --- what embeddings are --------------------------------------------------------------------------


def test_equal_numbers_hash_alike_even_zeros_of_either_sign():
    plus, minus = Embeddings(np.array([[0.0]])), Embeddings(np.array([[-0.0]]))

    assert plus == minus
    assert plus.sha256 == minus.sha256
    assert hash(plus) == hash(minus)


def test_they_show_themselves_in_one_short_line():
    embeddings = Embeddings(VECTORS, source="a.npy")

    assert repr(embeddings) == f"Embeddings(3x8, sha256 {embeddings.sha256[:12]}, 'a.npy')"


# --- what holds none ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (
            7,
            r"7 holds no embeddings; give a path, a data: URL, the bytes of a file "
            r"\(.npy\) or an arr",
        ),
        ([[0.5]], r"\[\[0.5\]\] holds no embeddings"),
        (b"", "the data is not a readable .npy file; write it with numpy.save"),
        (b"PK\x03\x04", "the data is not a readable .npy file"),
        (npy(VECTORS)[:40], "the data is not a readable .npy file"),
        (npy(VECTORS)[:-1], r"the data is damaged or cut off: 95 bytes for 3x8 numbers of float32"),
        (npy(VECTORS) + b"\0", "the data is damaged or cut off: 97 bytes"),
        (npy_that_claims((3, 8), version=(3, 0)), "the data is not a readable .npy file"),
        (npy_that_claims((3, 8), "<q9"), "the data is not a readable .npy file"),
        (npy_that_claims((-3, 8)), "the data has -3 vectors of 8 numbers"),
        (npy_that_claims((3, 2.5)), "the data is not a readable .npy file"),
        (npy_that_claims((1000, 16000)), "damaged or cut off: 0 bytes for 1000x16000 numbers"),
        (npy_that_claims((2**40, 2**40)), "the data has 1099511627776 vectors"),
        (
            npy_that_claims((3, 8), [("a", "<f4")]),
            "give floating-point numbers, one vector per row",
        ),
        ("missing.npy", "missing.npy cannot be read: No such file or directory"),
        ("data:application/octet-stream,abc", "is not a data: URL in base64"),
        (VECTORS[0], r"the array is of float32 and shape \(8,\); give floating-point numbers"),
        (VECTORS[None], r"the array is of float32 and shape \(1, 3, 8\)"),
        (VECTORS.astype(int), "the array is of int64 and shape"),
        (VECTORS.astype(complex), "the array is of complex128"),
        (np.zeros((0, 8)), "the array has 0 vectors of 8 numbers; give 1 to 1024 of 1 to 16384"),
        (np.zeros((8, 0)), "the array has 8 vectors of 0 numbers"),
        (np.zeros((MAX_VECTORS + 1, 1)), "the array has 1025 vectors"),
        (np.zeros((1, MAX_WIDTH + 1)), "the array has 1 vectors of 16385 numbers"),
        (np.array([[0.0], [np.nan]]), "vector 1 holds a number that is NaN, infinite or too large"),
        (np.array([[np.inf]]), "vector 0 holds a number that is NaN, infinite or too large"),
        (np.array([[1.0], [1e39]]), "vector 1 holds a number that is .* too large for float32"),
        (npy(np.array([[np.nan]])), "vector 0 holds a number that is NaN"),
    ],
)
def test_what_holds_no_embeddings_is_one_sentence(value, reason):
    assert re.search(reason, one_sentence(value))


def test_a_pickle_in_a_file_is_not_read():
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("a pickle was read",)

    data = npy(np.array([[Trap()]], dtype=object), allow_pickle=True)

    assert "is of object and shape" in one_sentence(data)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_spoilt_file_is_embeddings_or_one_sentence(data):
    file = bytearray(npy(VECTORS))
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, 127))] = data.draw(st.integers(0, 255))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a header looks like one of Python 2
        try:
            embeddings = Embeddings.read(bytes(file))
        except ValueError:
            return

    assert embeddings.values.dtype == np.float32
