"""The tokenizers against known answers, their limits, and vocabulary files that are wrong.

tests/reference/test_tokenizers_reference.py asks transformers itself.
"""

import gzip
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import pytest

from ldm_runtime.text import ClipTokenizer, WordPieceTokenizer, open_tokenizer_file

VOCABULARIES = Path(find_spec("ldm_export").submodule_search_locations[0], "vocabularies")
HEADER = "#version: 0.2\n"
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@pytest.fixture(scope="module")
def clip():
    return ClipTokenizer.from_file(VOCABULARIES / "clip_bpe_simple_vocab_16e6.txt.gz")


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
        (gzip.compress(b"#version: 0.2\na b\n", mtime=0)[:-9], "damaged"),
        (b"\x1f\x8bno gzip", "damaged"),
    ],
)
def test_a_malformed_vocabulary_is_refused_naming_file_and_line(tmp_path, content, fault):
    path = tmp_path / "merges.txt"
    path.write_bytes(content)

    with pytest.raises(ValueError, match=rf"merges\.txt.*{fault}"):
        ClipTokenizer.from_file(path)


# --- BERT -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert():
    return WordPieceTokenizer.from_file(VOCABULARIES / "bert_base_uncased_vocab.txt")


@pytest.fixture
def pieces():
    """Knows "a", "ab" and "abc", two of their continuations, and an exclamation mark."""
    return WordPieceTokenizer([*SPECIALS, "a", "ab", "abc", "##c", "##cd", "!"])


def test_a_photo_of_a_cat_has_the_ids_of_bert_base_uncased(bert):
    encoding = bert.encode("a photo of a cat", 77, pad_token_id=0)

    assert encoding.ids == (101, 1037, 6302, 1997, 1037, 4937, 102, *[0] * 70)
    assert encoding.cut == ""
    assert (bert.vocab_size, bert.start_id, bert.end_id, bert.pad_id) == (30522, 101, 102, 0)


@pytest.mark.parametrize(
    ("text", "ids"),
    [  # printed by BertTokenizerFast of transformers 5.23.0
        ("", []),
        ("  A\tPhoto\n of a   CAT!! ", [1037, 6302, 1997, 1037, 4937, 999, 999]),
        ("Café Cafe\u0301 naïve q\u0301", [7668, 7668, 15743, 1053]),
        ("unaffable embeddings", [14477, 20961, 3468, 7861, 8270, 4667, 2015]),
        ("don't $5 a_b-c", [2123, 1005, 1056, 1002, 1019, 1037, 1035, 1038, 1011, 1039]),
        ("1984 ½ ٣", [3118, 1092, 100]),
        ("İstanbul ΟΔΟΣ", [9960, 1169, 29722, 29730, 29733]),
        ("猫cat猫", [100, 4937, 100]),
        ("a\u00adb a\u200bb a\x00b \ufffda\x0bb", [11113, 11113, 11113, 11113]),
        ("a\u3000b\u2028c", [1037, 1038, 1039]),
        ("one [SEP] [sep] two", [2028, 102, 1031, 19802, 1033, 2048]),
        ("[MASK]cat", [103, 4937]),
        ("x" * 100, [22038, *[20348] * 49]),
        ("x" * 101 + " cat", [100, 4937]),
        ("x\u0301" * 100, [22038, *[20348] * 49]),
        ("😀 cat", [100, 4937]),
    ],
    ids=[
        "empty",
        "case and white space",
        "accents vanish",
        "pieces of words",
        "punctuation stands alone",
        "digits of any script",
        "no final sigma",
        "chinese characters stand alone",
        "control characters vanish",
        "unicode white space",
        "special token",
        "special token in a word",
        "a hundred characters",
        "more are unknown",
        "a hundred without their accents",
        "emoji",
    ],
)
def test_text_is_split_and_lowered_as_bert_does(bert, text, ids):
    expected = (101, *ids, 102)

    encoding = bert.encode(text, max_tokens=len(expected))

    assert encoding.ids == expected
    assert encoding.cut == ""
    assert bert.token_ids(text) == tuple(ids)


def test_the_longest_piece_wins_and_what_fails_later_is_unknown_as_a_whole(pieces):
    assert pieces.token_ids("abcd abcc ABC a") == (1, 7, 8, 7, 5)  # abc leaves no d, though ab + cd


@pytest.mark.parametrize(
    ("text", "max_tokens", "ids", "cut"),
    [
        ("ab a! AB", 6, (2, 6, 5, 10, 6, 3), ""),
        ("ab a! AB", 5, (2, 6, 5, 10, 3), "AB"),
        ("a  Ábcc, a", 4, (2, 5, 7, 3), "Ábcc, a"),
        ("a \x00A\u0301\u0302b a", 3, (2, 5, 3), "A\u0301\u0302b a"),
        ("a[MASK] a", 3, (2, 5, 3), "[MASK] a"),
        ("ab [MASK] AB", 4, (2, 6, 4, 3), "AB"),
        ("猫a", 3, (2, 1, 3), "a"),
        ("", 4, (2, 3, 0, 0), ""),
    ],
    ids=[
        *("fits", "whole words", "in part", "accents"),
        *("special token", "after a special token", "chinese", "empty"),
    ],
)
def test_what_does_not_fit_is_reported_as_it_was_typed(pieces, text, max_tokens, ids, cut):
    encoding = pieces.encode(text, max_tokens)

    assert encoding.ids == ids
    assert encoding.cut == cut


def test_bert_pads_with_its_own_token_or_any_other(pieces):
    assert pieces.encode("a", 5).ids == (2, 5, 3, 0, 0)
    assert pieces.encode("a", 5, pad_token_id=7).ids == (2, 5, 3, 7, 7)


def test_bert_refuses_what_clip_refuses(pieces):
    with pytest.raises(ValueError, match=r"max_tokens must be at least 2.*got 1"):
        pieces.encode("a", 1)
    for read in (pieces.encode, pieces.token_ids):
        with pytest.raises(ValueError, match=r"'\\udc80', at position 2"):
            read("a \udc80")


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_word_piece_vocabulary_is_read_plain_or_compressed(tmp_path, compress, ending):
    path = tmp_path / "vocab.txt"
    path.write_bytes(compress(((ending or "\n").join((*SPECIALS, "ab", "##c")) + ending).encode()))

    tokenizer = WordPieceTokenizer.from_file(path)

    assert tokenizer.vocab_size == 7
    assert tokenizer.token_ids("ABC") == (5, 6)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", r"line 1: expected a new token without white space, found ''"),
        (b"[PAD]\n\na\n", "line 2: .*found ''"),
        (b"[PAD]\na b\n", "line 2: .*found 'a b'"),
        (b"[PAD]\na\n[PAD]\n", "line 3: .*found line 1 again"),
        (b"[PAD]\n[UNK]\n[CLS]\na\n", r"lacks \[SEP\], \[MASK\]; it is not BERT's"),
        (b"#version: 0.2\ni n\n", "line 1: .*found '#version: 0.2'"),
        (b"[PAD]\n\xff", "damaged"),
        (gzip.compress(b"[PAD]\n", mtime=0)[:-3], "damaged"),
    ],
)
def test_a_malformed_word_piece_vocabulary_is_refused_naming_the_file(tmp_path, content, fault):
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)

    with pytest.raises(ValueError, match=rf"vocab\.txt.*{fault}"):
        WordPieceTokenizer.from_file(path)


def test_a_vocabulary_with_a_token_twice_is_refused():
    with pytest.raises(ValueError, match="1 of 7 tokens repeat others"):
        WordPieceTokenizer([*SPECIALS, "a", "a"])


def test_a_file_is_opened_with_the_tokenizer_that_it_is_for(tmp_path):
    path = tmp_path / "words"
    path.write_text("neither\n")

    opened = [type(open_tokenizer_file(each)) for each in sorted(VOCABULARIES.iterdir())]

    assert opened == [WordPieceTokenizer, ClipTokenizer]
    with pytest.raises(ValueError, match="words: the vocabulary lacks"):
        open_tokenizer_file(path)


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_file_that_unpacks_to_more_than_any_vocabulary_is_refused_before_it_does(
    tmp_path, compress
):
    path = tmp_path / "vocabulary"
    path.write_bytes(compress(HEADER.encode() + b" " * (100 << 20)))
    tracemalloc.start()

    with pytest.raises(ValueError, match="has more than 8388608 bytes, which no vocabulary has"):
        open_tokenizer_file(path)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 << 20
