"""CLIP's tokenizer against known answers, its limits, and vocabulary files that are wrong.

tests/reference/test_tokenizers_reference.py asks transformers itself.
"""

import gzip
from importlib.util import find_spec
from pathlib import Path

import pytest

from ldm_runtime.tokenizers import ClipTokenizer

HEADER = "#version: 0.2\n"


@pytest.fixture(scope="module")
def clip():
    folder = find_spec("ldm_export").submodule_search_locations[0]
    return ClipTokenizer.from_file(
        Path(folder, "vocabularies", "clip_bpe_simple_vocab_16e6.txt.gz")
    )


@pytest.fixture
def tiny():
    """Knows the words "ab" and "abc" whole, everything else byte by byte."""
    return ClipTokenizer([("b", "c</w>"), ("a", "b</w>"), ("a", "bc</w>")])


def test_a_photo_of_a_cat_has_the_ids_of_the_original_vocabulary(clip):
    encoding = clip.encode("a photo of a cat")

    assert encoding.ids == (49406, 320, 1125, 539, 320, 2368, *[49407] * 71)
    assert encoding.cut == ""
    assert (clip.vocab_size, clip.start_id, clip.end_id) == (49408, 49406, 49407)


@pytest.mark.parametrize(
    ("text", "ids"),
    [  # printed by CLIPTokenizer of transformers 5.23.0
        ("", []),
        ("  A\tPhoto\n of a   CAT!! ", [320, 1125, 539, 320, 2368, 748]),
        ("don't you're they'LL", [847, 713, 592, 982, 889, 1342]),
        ("1984 ½ ٣", [272, 280, 279, 275, 33613, 149, 352]),
        ("Café Cafe\u0301", [15304, 15304]),
        ("İstanbul", [328, 16384, 11231]),
        ("ΟΔΟΣ ẞ", [138, 123, 138, 112, 138, 123, 139, 481, 127, 509]),
        ("a\u00a0b\u2003c\u0085d", [320, 321, 322, 323]),
        ("a\x1cb", [320, 472, 321]),
        ("猫 😀", [163, 234, 360, 7334]),
        ("a_b-c", [320, 318, 321, 268, 322]),
        ("one <|endoftext|> two", [637, 49407, 1237]),
        ("<|ENDOFTEXT|>!", [27, 347, 40786, 4160, 91, 285, 256]),
        ("<|stаrtoftext|>", [27, 347, 522, 16912, 81, 6659, 4160, 91, 285]),
    ],
    ids=[
        "empty",
        "case and white space",
        "contractions",
        "digits one by one",
        "composed and decomposed",
        "one letter becomes two",
        "no final sigma",
        "unicode white space",
        "a control character is no white space",
        "cjk and emoji",
        "underscore is no letter",
        "special token",
        "upper case is not special",
        "a cyrillic letter is not special",
    ],
)
def test_text_is_split_and_lowered_as_transformers_does(clip, text, ids):
    expected = (49406, *ids, 49407)

    encoding = clip.encode(text, max_tokens=len(expected))

    assert encoding.ids == expected
    assert encoding.cut == ""


def test_ids_follow_the_bytes_then_the_merges_then_the_special_tokens(tiny):
    encoding = tiny.encode("ab abc <|startoftext|>", max_tokens=5)

    assert encoding.ids == (515, 513, 514, 515, 516)
    assert tiny.vocab_size == 517


def test_the_earliest_merge_wins_over_the_leftmost():
    tokenizer = ClipTokenizer([("b", "c</w>"), ("a", "b")])

    ids = tokenizer.encode("abc", max_tokens=4).ids

    assert ids == (514, 64, 512, 515)  # a + bc, not ab + c


def test_text_that_exactly_fits_is_not_cut(tiny):
    encoding = tiny.encode("ab abc ", max_tokens=4)

    assert encoding.ids == (515, 513, 514, 516)
    assert encoding.cut == ""


@pytest.mark.parametrize(
    ("text", "max_tokens", "cut"),
    [
        ("ab ab ab abc AB,  ab", 6, "AB,  ab"),
        ("ab ab ab cab", 6, "cab"),
        ("ab İİ abc", 5, "İİ abc"),
        ("ab ab <|endoftext|><|endoftext|> Ab<|endoftext|>", 5, "<|endoftext|> Ab<|endoftext|>"),
    ],
    ids=["whole words", "a word that fits in part", "lowering lengthens", "special tokens"],
)
def test_text_that_does_not_fit_is_cut_and_reported_as_it_was_typed(tiny, text, max_tokens, cut):
    encoding = tiny.encode(text, max_tokens=max_tokens)

    assert encoding.cut == cut
    assert len(encoding.ids) == max_tokens
    assert encoding.ids[-1] == tiny.end_id


def test_a_cut_prompt_keeps_its_first_ids(clip):
    encoding = clip.encode("cat " * 100)

    assert encoding.ids == (49406, *[2368] * 75, 49407)
    assert encoding.cut == "cat " * 25


def test_padding_can_be_another_token(tiny):
    encoding = tiny.encode("ab", max_tokens=5, pad_token_id=0)

    assert encoding.ids == (515, 513, 516, 0, 0)


def test_a_very_long_word_gives_the_ids_of_its_merges(tiny):
    length = 30_000

    encoding = tiny.encode("b" * length + "abc", max_tokens=length + 3)

    assert encoding.ids == (515, *[65] * length, 514, 516)


def test_fewer_than_two_tokens_are_refused(tiny):
    with pytest.raises(ValueError, match=r"max_tokens must be at least 2.*got 1"):
        tiny.encode("ab", max_tokens=1)


def test_half_a_surrogate_pair_is_refused_with_its_position(tiny):
    with pytest.raises(ValueError, match=r"'\\udc80', at position 3"):
        tiny.encode("ab \udc80")


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_merges_are_read_plain_or_compressed(tmp_path, compress, ending):
    path = tmp_path / "merges"
    path.write_bytes(compress(f"{HEADER}a b{ending or chr(10)}ab c</w>{ending}".encode()))

    tokenizer = ClipTokenizer.from_file(path)

    assert tokenizer.vocab_size == 516
    assert tokenizer.encode("abc", max_tokens=3).ids == (514, 513, 515)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"a b\n", "line 1: expected '#version"),
        (b"", "line 1: expected '#version"),
        (b"#version: 0.2\na b\nabc\n", "line 3: .*'abc'"),
        (b"#version: 0.2\na b\n\nab c\n", "line 3: "),
        (b"#version: 0.2\na b c\n", "line 2: .*'a b c'"),
        (b"#version: 0.2\na b\nax b\n", "line 3: .*'ax b'"),
        (b"#version: 0.2\na b\na b\n", "line 3: .*join to a new one"),
        (b"#version: 0.2\n\xff\xfe\n", "damaged"),
        (gzip.compress(b"#version: 0.2\na b\n")[:-9], "damaged"),
        (b"\x1f\x8bno gzip", "damaged"),
    ],
)
def test_a_malformed_vocabulary_is_refused_naming_file_and_line(tmp_path, content, fault):
    path = tmp_path / "merges.txt"
    path.write_bytes(content)

    with pytest.raises(ValueError, match=rf"merges\.txt.*{fault}"):
        ClipTokenizer.from_file(path)
