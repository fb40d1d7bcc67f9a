r"""BERT's tokenizer: lower-cased words without accents, cut into the longest known pieces.

A word that is not in the vocabulary becomes the longest entry that it starts with, then the longest
`##` entry that the rest starts with, and so on; if that fails somewhere, the whole word is `[UNK]`
(Wu et al. 2016, arXiv:1609.08144, section 4.1; Devlin et al. 2019, arXiv:1810.04805). Text is split
at white space, around punctuation and around Chinese characters.

The ids are those of transformers' BertTokenizer for bert-base-uncased (checked with 5.23, where
BertTokenizerFast is the same class) for every character in Python 3.11's Unicode tables (14.0) but
503: accents, punctuation and format characters of rarer scripts that Unicode gained, or put into
another category, since transformers' tables were made. It takes them for letters; here they are
what they are, as in its older tokenizer in pure Python.
"""

import re
import string
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Self

from ldm_runtime.text.contract import (
    Encoding,
    Frame,
    LearnedWord,
    Word,
    check_encodable,
    fit_words,
)
from ldm_runtime.text.vocabulary_file import read_vocabulary

MAX_WORD = 100  # characters; a longer word is unknown
_PAD, _UNKNOWN, _START, _END, _MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
_SPECIALS = (_PAD, _UNKNOWN, _START, _END, _MASK)
_SPECIAL = re.compile(f"({'|'.join(map(re.escape, _SPECIALS))})")
_CONTINUED = "##"
_CACHED_WORDS = 4096
# The blocks of Chinese characters that BERT names, without U+2B820 to U+2B91F, which transformers
# leaves out.
_CHINESE = (
    *(range(0x4E00, 0xA000), range(0x3400, 0x4DC0), range(0xF900, 0xFB00)),
    *(range(0x20000, 0x2A6E0), range(0x2A700, 0x2B820), range(0x2B920, 0x2CEB0)),
    range(0x2F800, 0x2FA20),
)
_PUNCTUATION = frozenset(string.punctuation)


class WordPieceTokenizer:
    """BERT's WordPiece, uncased.

    The special tokens, typed in a text in capitals, become their ids, as in transformers.

    Args:
        vocabulary: The tokens in the order of their ids, `[PAD]`, `[UNK]`, `[CLS]`, `[SEP]` and
            `[MASK]` among them.

    Raises:
        ValueError: A special token is missing, or a token occurs twice.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self._ids = {token: index for index, token in enumerate(vocabulary)}
        missing = [token for token in _SPECIALS if token not in self._ids]
        if missing:
            raise ValueError(f"the vocabulary lacks {', '.join(missing)}; it is not BERT's")
        if len(self._ids) != len(vocabulary):
            raise ValueError(
                f"{len(vocabulary) - len(self._ids)} of {len(vocabulary)} tokens repeat others; "
                "take the vocabulary from the model's own release"
            )
        self._unknown = (self._ids[_UNKNOWN],)
        self._longest = max(map(len, vocabulary))
        self._word_ids = lru_cache(maxsize=_CACHED_WORDS)(self._encode_word)
        self.vocab_size = len(vocabulary)
        self.learned_words: tuple[LearnedWord, ...] = ()
        self.start_id = self._ids[_START]
        self.end_id = self._ids[_END]
        self.pad_id = self._ids[_PAD]

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read BERT's `vocab.txt`, one token per line, compressed or not.

        Raises:
            ValueError: The file is not such a vocabulary; the message names the line.
        """
        lines: dict[str, int] = {}
        for number, token in enumerate(read_vocabulary(path), start=1):
            if not token or token.split() != [token] or token in lines:
                reason = f"line {lines[token]} again" if token in lines else repr(token[:40])
                raise ValueError(
                    f"{path}, line {number}: expected a new token without white space, found "
                    f"{reason}; take the file from the model's own release"
                )
            lines[token] = number
        try:
            return cls(tuple(lines))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def encode(
        self, text: str, max_tokens: int = 77, *, pad_token_id: int | None = None
    ) -> Encoding:
        """Tokenize one text; what does not fit is left out and reported in `Encoding.cut`.

        Args:
            text: Any Unicode text; case, accents and white space do not matter.
            max_tokens: How many ids to return, start and end token included; at least 2.
            pad_token_id: Fills the rest; None is `[PAD]`, which is 0 in BERT's vocabulary.

        Raises:
            ValueError: `max_tokens` is too small, or the text holds half a surrogate pair.
        """
        check_encodable(text)
        padding = self.pad_id if pad_token_id is None else pad_token_id
        frame = Frame(self.start_id, self.end_id, padding)
        return fit_words(self._words(text), text, max_tokens, frame)

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Return the ids of a whole text, without start, end and padding.

        Raises:
            ValueError: The text holds half a surrogate pair.
        """
        check_encodable(text)
        return tuple(token for _, word_ids in self._words(text) for token in word_ids)

    def _words(self, text: str) -> Iterator[Word]:
        """Yield every word's offset in the text, and its ids."""
        offset = 0
        for piece in _SPECIAL.split(text):
            if piece in _SPECIALS:
                yield offset, (self._ids[piece],)
            else:
                for start, word in _split_words(piece):
                    is_short = len(word) <= MAX_WORD
                    yield offset + start, self._word_ids(word) if is_short else self._unknown
            offset += len(piece)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        ids: list[int] = []
        start = 0
        while start < len(word):
            found = self._longest_piece(word, start)
            if found is None:
                return self._unknown
            start, token = found
            ids.append(token)
        return tuple(ids)

    def _longest_piece(self, word: str, start: int) -> tuple[int, int] | None:
        """Return where the longest piece that is known ends, and its id, if one is."""
        prefix = _CONTINUED if start else ""
        for end in range(min(len(word), start + self._longest), start, -1):
            token = self._ids.get(prefix + word[start:end])
            if token is not None:
                return end, token
        return None


def _split_words(text: str) -> Iterator[tuple[int, str]]:
    """Yield every word and punctuation mark, as BERT reads it, with its offset in the text."""
    word, first = "", 0
    for offset, character in _plain_characters(text):
        if character == " " or _is_punctuation(character):
            if word:
                yield first, word
            word = ""
            if character != " ":
                yield offset, character
            continue
        if not word:
            first = offset
        word += character
    if word:
        yield first, word


def _plain_characters(text: str) -> Iterator[tuple[int, str]]:
    """Yield the normalised characters of a text, each with its offset in the text.

    Control characters vanish, white space of any kind becomes a space, Chinese characters get
    spaces around them; then accents vanish and what is left is lower-cased, one character at a time
    and so without a final sigma.
    """
    for offset, sequence in _sequences(_spaced(text)):
        for decomposed in unicodedata.normalize("NFD", sequence):
            if unicodedata.category(decomposed) != "Mn":
                for character in decomposed.lower():
                    yield offset, character


def _spaced(text: str) -> Iterator[tuple[int, str]]:
    for offset, character in enumerate(text):
        if character in "\t\n\r":
            yield offset, " "
        elif character == "\ufffd" or unicodedata.category(character) in ("Cc", "Cf", "Co"):
            continue
        elif character.isspace():
            yield offset, " "
        elif any(ord(character) in block for block in _CHINESE):
            yield offset, " "
            yield offset, character
            yield offset, " "
        else:
            yield offset, character


def _sequences(characters: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Join what combines with what is before it, because normalisation may reorder it."""
    sequence, first = "", 0
    for offset, character in characters:
        if sequence and unicodedata.combining(unicodedata.normalize("NFD", character)[0]):
            sequence += character
        else:
            if sequence:
                yield first, sequence
            sequence, first = character, offset
    if sequence:
        yield first, sequence


def _is_punctuation(character: str) -> bool:
    return character in _PUNCTUATION or unicodedata.category(character)[0] == "P"
