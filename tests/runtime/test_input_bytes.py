import base64

import pytest

from ldm_runtime.inputs.reading import read_bytes

DATA = b"some bytes"
URL = f"data:text/plain;base64,{base64.b64encode(DATA).decode()}"


def test_bytes_a_path_and_a_url_are_read_and_named(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(DATA)

    assert read_bytes(DATA, 10) == read_bytes(bytearray(DATA), 10) == (DATA, "the data", None)
    assert read_bytes(path, 10) == read_bytes(str(path), 10) == (DATA, str(path), str(path))
    assert read_bytes(URL, 10) == (DATA, "the data: URL", None)


def test_base64_may_be_broken_into_lines_and_data_written_in_capitals():
    assert read_bytes(f"DATA:;BASE64,{base64.encodebytes(DATA).decode()}", 10).data == DATA


def test_one_byte_above_the_limit_is_refused_wherever_it_comes_from(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(DATA)

    for value in (DATA, path, URL):
        with pytest.raises(ValueError, match="has more than 9 bytes; make it smaller"):
            read_bytes(value, 9)


def test_a_file_without_an_end_is_read_to_the_limit_only():
    with pytest.raises(ValueError, match="/dev/zero has more than 1000 bytes"):
        read_bytes("/dev/zero", 1000)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("missing", "^missing cannot be read: No such file or directory$"),
        (".", "cannot be read: Is a directory"),
        ("a\0b", "cannot be read: embedded null byte"),
        ("data:text/plain,abc", r"is not a data: URL in base64; write data:image/png;base64,…"),
        ("data:;base64,a*b", "is not valid base64"),
        ("data:;base64,ä", "is not valid base64"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(value, reason):
    with pytest.raises(ValueError, match=reason):
        read_bytes(value, 100)
