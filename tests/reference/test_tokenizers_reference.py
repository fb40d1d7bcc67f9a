"""CLIP's tokenizer against transformers' CLIPTokenizer, over Unicode text.

Only characters that Python's Unicode tables know are tried. Transformers normalises with older
tables and so orders the accents of some newer scripts differently; text on which the two normal
forms differ is left out, and a test counts the characters that this excuses.
"""

import gzip
import json
import sys
import unicodedata
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers.normalizers import NFC
from transformers import CLIPTokenizer

from ldm_runtime.tokenizers import ClipTokenizer

pytestmark = pytest.mark.reference

VOCABULARY = Path(
    find_spec("ldm_export").submodule_search_locations[0],
    "vocabularies",
    "clip_bpe_simple_vocab_16e6.txt.gz",
)
FRAGMENTS = [
    *("<|startoftext|>", "<|endoftext|>", "<|EndOfText|>", "<|", "|>"),
    *("'s", "'LL", "''", "don't", "a photo of", "Photograph", "  ", "\t\n", "1234", "...", "!?"),
    *("\u0301", "\u0307", "\u0345", "\u0338", "Σ", "ς", "ẞ", "İ", "ŉ", "\u212a", "\u037e"),
    *("\x00", "\x1c", "\x85", "\xa0", "\u200b", "\u200d", "\u2028", "\ufeff", "\ufffd"),
    *("가", "\u1100\u1161", "猫", "½", "Ⅷ", "ⓐ", "👩\u200d🚀", "é", "ﬁ", "ﷺ"),
]
TEXT = st.lists(
    st.sampled_from(FRAGMENTS)
    | st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=6)
    | st.text(st.characters(codec="ascii"), max_size=12),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def ours():
    return ClipTokenizer.from_file(VOCABULARY)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Transformers' tokenizer, from a vocabulary put together as OpenAI's CLIP does it."""
    merges = gzip.decompress(VOCABULARY.read_bytes()).decode().split("\n")[1:48895]
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(0xAE, 0x100)]
    symbols = [chr(byte) for byte in visible]
    symbols += [chr(0x100 + index) for index in range(0x100 - len(visible))]
    vocabulary = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    vocabulary += [merge.replace(" ", "") for merge in merges]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("clip")
    ids = {token: index for index, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def has_one_normal_form(text):
    return NFC().normalize_str(text) == unicodedata.normalize("NFC", text)


@settings(max_examples=1000, deadline=None)
@given(text=TEXT)
def test_any_text_has_the_ids_of_transformers(ours, theirs, text):
    assume(has_one_normal_form(text))
    expected = theirs(text).input_ids

    encoding = ours.encode(text, max_tokens=len(expected))

    assert list(encoding.ids) == expected
    assert encoding.cut == ""


@settings(max_examples=300, deadline=None)
@given(text=TEXT, max_tokens=st.integers(2, 20))
def test_text_is_cut_and_padded_as_transformers_does(ours, theirs, text, max_tokens):
    assume(has_one_normal_form(text))
    expected = theirs(text, truncation=True, max_length=max_tokens, padding="max_length").input_ids
    is_cut = len(theirs(text).input_ids) > max_tokens

    encoding = ours.encode(text, max_tokens=max_tokens)

    assert list(encoding.ids) == expected
    assert bool(encoding.cut) == is_cut


@pytest.mark.slow
def test_every_assigned_character_has_the_ids_of_transformers(ours, theirs):
    known = [
        f"a{character}b 1{character}!{character}'s A\u0301{character}\u0323"
        for character in map(chr, range(sys.maxunicode + 1))
        if unicodedata.category(character) not in ("Cn", "Co", "Cs")
    ]
    texts = [text for text in known if has_one_normal_form(text)]

    for start in range(0, len(texts), 64):
        text = " ".join(texts[start : start + 64])
        expected = theirs(text).input_ids
        assert list(ours.encode(text, max_tokens=len(expected)).ids) == expected

    assert len(texts) > 144_000
    assert len(known) - len(texts) < 100  # 74 with Unicode 14: accents of newer scripts
