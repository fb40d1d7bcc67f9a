"""CLIP's tokenizer: pairs of bytes, joined as often as they are in its list of merges.

It is byte-pair encoding over the bytes of each lower-cased word, where the last symbol of a word
carries `</w>` (Sennrich et al. 2016, arXiv:1508.07909; Radford et al. 2021, arXiv:2103.00020). The
ids are those of transformers' CLIPTokenizer (checked with 5.23) for every character in Python
3.11's Unicode tables (14.0) but 74 accents of rarer scripts, which transformers normalises with
older tables; characters that Unicode gained since are a matter of Python's version.
"""

import heapq
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Self

from ldm_runtime.text.contract import (
    Encoding,
    Frame,
    LearnedWord,
    Word,
    check_encodable,
    fit_words,
    learned_ids,
)
from ldm_runtime.text.vocabulary_file import read_vocabulary

Merge = tuple[str, str]

_START, _END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
_SPECIAL = re.compile(rf"({re.escape(_START)}|{re.escape(_END)})")
_LETTER = r"[^\W\d_]"
_PLAIN_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+"
# Special tokens are cut out before lower-casing, so "<|EndOfText|>" is ordinary text. Still the
# original pattern lists them, which parts "<|EndOfText|>!" between ">" and "!".
_WORD = re.compile(rf"{_SPECIAL.pattern}|{_PLAIN_WORD}", re.ASCII)
_PART = re.compile(_PLAIN_WORD, re.ASCII)
_MAX_MERGES = 49408 - 2 * 256 - 2  # CLIP uses the first of the 262,144 merges in its file
_CACHED_WORDS = 4096


class _Piece(NamedTuple):
    """A stretch of a text: to be split into words, or a whole word with its ids."""

    text: str
    ids: tuple[int, ...] = ()


class ClipTokenizer:
    """CLIP's byte-pair encoding.

    Ids are the 256 bytes, the 256 bytes that end a word, one id per merge, then the start and end
    tokens. Those two, typed in a text, become the special ids, as in transformers; so do learned
    words, in any case, unless a letter goes on where the word begins or ends with one.

    Args:
        merges: Pairs of symbols to join, most frequent first; each symbol is a byte or the result
            of an earlier merge.
        learned_words: Words with ids of their own; where two begin, the longer is taken.
    """

    def __init__(self, merges: Sequence[Merge], learned_words: Sequence[LearnedWord] = ()) -> None:
        self._alphabet = _byte_symbols()
        tokens = [*_base_symbols(), *map("".join, merges), _START, _END]
        self._ids = {token: index for index, token in enumerate(tokens)}
        self._ranks = {merge: rank for rank, merge in enumerate(merges)}
        self._word_ids = lru_cache(maxsize=_CACHED_WORDS)(self._encode_word)
        self.vocab_size = len(tokens)
        self.start_id = len(tokens) - 2
        self.end_id = len(tokens) - 1
        self.learned_words = tuple(learned_words)
        longest_first = sorted(
            zip(learned_words, learned_ids(learned_words, self.vocab_size), strict=True),
            key=lambda pair: -len(pair[0].text),
        )
        patterns = [_pattern(word.text) for word, _ in longest_first]
        self._special = re.compile("|".join((_SPECIAL.pattern, *patterns)))
        self._special_ids = [tuple(ids) for _, ids in longest_first]

    @classmethod
    def from_file(cls, path: Path, learned_words: Sequence[LearnedWord] = ()) -> Self:
        """Read CLIP's `bpe_simple_vocab_16e6.txt.gz`, or a `merges.txt`, compressed or not.

        Raises:
            ValueError: The file is not a list of merges; the message names the line.
        """
        return cls(_read_merges(path), learned_words)

    def encode(
        self, text: str, max_tokens: int = 77, *, pad_token_id: int | None = None
    ) -> Encoding:
        """Tokenize one text; what does not fit is left out and reported in `Encoding.cut`.

        Args:
            text: Any Unicode text; case and white space do not matter.
            max_tokens: How many ids to return, start and end token included; at least 2.
            pad_token_id: Fills the rest; None is the end token, which all but Stable Diffusion 2
                use.

        Raises:
            ValueError: `max_tokens` is too small, or the text holds half a surrogate pair.
        """
        pieces = self._pieces(text)
        padding = self.end_id if pad_token_id is None else pad_token_id
        frame = Frame(self.start_id, self.end_id, padding)
        joined = "".join(piece.text for piece in pieces)
        return fit_words(self._words(pieces), joined, max_tokens, frame)

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Return the ids of a whole text, without start, end and padding.

        Raises:
            ValueError: The text holds half a surrogate pair.
        """
        return tuple(token for _, word_ids in self._words(self._pieces(text)) for token in word_ids)

    def _pieces(self, text: str) -> list[_Piece]:
        """Cut out the words that have ids of their own and compose the characters of the rest."""
        check_encodable(text)
        pieces, position = [], 0
        for found in self._special.finditer(text):
            pieces.append(_Piece(unicodedata.normalize("NFC", text[position : found.start()])))
            pieces.append(_Piece(found[0], self._ids_of(found)))
            position = found.end()
        pieces.append(_Piece(unicodedata.normalize("NFC", text[position:])))
        return pieces

    def _ids_of(self, found: re.Match[str]) -> tuple[int, ...]:
        """Return the ids of a special token, the first group of the pattern, or a learned word."""
        assert found.lastindex is not None, "every alternative is a group"
        if found.lastindex == 1:
            return (self._ids[found[0]],)
        return self._special_ids[found.lastindex - 2]

    def _words(self, pieces: Sequence[_Piece]) -> Iterator[Word]:
        """Yield every word's offset in the joined pieces, and its ids."""
        offset = 0
        for piece in pieces:
            if piece.ids:
                yield offset, piece.ids
            else:
                for start, word in _split_words(piece.text):
                    yield offset + start, self._word_ids(word)
            offset += len(piece.text)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        symbols = [self._alphabet[byte] for byte in word.encode()]
        symbols[-1] += _WORD_END
        return tuple(self._ids[symbol] for symbol in _merge(symbols, self._ranks))


def _pattern(word: str) -> str:
    """Return a group that matches a learned word in any case, and no part of a longer word."""
    before = rf"(?<!{_LETTER})" if word[0].isalpha() else ""
    after = rf"(?!{_LETTER})" if word[-1].isalpha() else ""
    return rf"({before}(?i:{re.escape(word)}){after})"


def _merge(symbols: Sequence[str], ranks: Mapping[Merge, int]) -> list[str]:
    """Join neighbours, lowest rank first and leftmost among equals, until none has a rank.

    A queue instead of a search for each merge: scripts without spaces make very long words.
    """
    parts = [*symbols, ""]  # the last is a stop, never part of a merge
    before, after = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))
    queue: list[tuple[int, int]] = []

    def rank(left: int) -> int | None:
        return ranks.get((parts[left], parts[after[left]]))

    def offer(left: int) -> None:
        if left >= 0 and (found := rank(left)) is not None:
            heapq.heappush(queue, (found, left))

    for left in range(len(symbols)):
        offer(left)
    while queue:
        expected, left = heapq.heappop(queue)
        if rank(left) != expected:
            continue  # one of the two has joined another neighbour since
        right = after[left]
        parts[left] += parts[right]
        parts[right] = ""
        after[left] = after[right]
        before[after[left]] = left
        offer(before[left])
        offer(left)
    return [part for part in parts if part]


def _split_words(text: str) -> Iterator[tuple[int, str]]:
    """Yield every lower-cased word with its offset in the text."""
    # One character at a time: Rust, unlike str.lower(), knows no final sigma here.
    lowered = [character.lower() for character in text]
    origin = [index for index, characters in enumerate(lowered) for _ in characters]
    lower = "".join(lowered)
    shape = "".join(map(_stand_in, lower))
    for word in _WORD.finditer(shape):
        for part in _PART.finditer(shape, *word.span()):
            yield origin[part.start()], lower[part.start() : part.end()]


def _stand_in(character: str) -> str:
    r"""An ASCII character of the same class: \p{L}, \p{N}, \s or none of them.

    `re` knows no Unicode categories, and its own \w and \d mean something else. The letter b and
    the exclamation mark occur in none of the fixed strings that the patterns look for.
    """
    if character.isascii():
        return character
    if character.isspace():
        return " "
    return {"L": "b", "N": "0"}.get(unicodedata.category(character)[0], "!")


def _byte_symbols() -> dict[int, str]:
    """One visible character for each byte, in the order of their ids."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    shifted = {byte: chr(256 + index) for index, byte in enumerate(hidden)}
    return {byte: chr(byte) for byte in visible} | shifted


def _base_symbols() -> list[str]:
    """The symbols that exist before any merge, in the order of their ids."""
    symbols = _byte_symbols().values()
    return [*symbols, *(symbol + _WORD_END for symbol in symbols)]


def _read_merges(path: Path) -> list[Merge]:
    header, *lines = read_vocabulary(path)
    if "#version" not in header:
        raise ValueError(f"{path}, line 1: expected '#version: 0.2', found {header[:40]!r}")
    known = set(_base_symbols())
    merges = []
    for number, line in enumerate(lines[:_MAX_MERGES], start=2):
        symbols = line.split(" ")
        if len(symbols) != 2 or not known.issuperset(symbols) or "".join(symbols) in known:
            raise ValueError(
                f"{path}, line {number}: expected two known symbols that join to a new one, "
                f"found {line[:40]!r}; take the file from the model's own release"
            )
        merges.append((symbols[0], symbols[1]))
        known.add("".join(symbols))
    return merges
