"""The interface of tokenizers, and the parts that do not depend on how words are split."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

#: A word's offset in its text, and the ids of its tokens.
Word = tuple[int, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """Token ids of one text.

    Attributes:
        ids: Start token, the text, end token, padding: always `max_tokens` long.
        cut: The text that did not fit, from the first word that did not fit whole; empty if
            everything did. CLIP's is in Unicode normal form NFC, BERT's as it was typed.
    """

    ids: tuple[int, ...]
    cut: str


@dataclass(frozen=True, kw_only=True, eq=False)
class LearnedWord:
    """A word whose embeddings were learned by textual inversion.

    It takes as many consecutive tokens as it has vectors. Source: Gal et al. 2022
    (arXiv:2208.01618).

    Attributes:
        text: The word, as prompts have it in any case.
        vectors: (n, width) float32 by the name of the text encoder that takes them; n is the same
            for all.
        sha256: Hash of the file that they are from.
    """

    text: str
    vectors: Mapping[str, npt.NDArray[np.float32]]
    sha256: str

    @property
    def num_tokens(self) -> int:
        """How many tokens it takes."""
        return min(map(len, self.vectors.values()))


def learned_ids(words: Sequence[LearnedWord], vocab_size: int) -> Iterator[range]:
    """Yield the token ids of every learned word; they follow those of the vocabulary."""
    start = vocab_size
    for word in words:
        yield range(start, start + word.num_tokens)
        start += word.num_tokens


class Tokenizer(Protocol):
    """A tokenizer: turns prompts into token ids.

    Attributes:
        vocab_size: How many ids the vocabulary has.
        start_id: First id of every encoded text.
        end_id: Id that ends the text.
        learned_words: Words with the ids of `learned_ids`.
    """

    vocab_size: int
    start_id: int
    end_id: int
    learned_words: tuple[LearnedWord, ...]

    def encode(
        self, text: str, max_tokens: int = 77, *, pad_token_id: int | None = None
    ) -> Encoding:
        """Tokenize one text; what does not fit is left out and reported in `Encoding.cut`.

        Args:
            text: Any Unicode text; case and white space do not matter.
            max_tokens: How many ids to return, start and end token included; at least 2.
            pad_token_id: Fills the rest; None is the tokenizer's default.

        Raises:
            ValueError: `max_tokens` is too small, or the text holds half a surrogate pair.
        """
        ...

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Return the ids of a whole text, without start, end and padding.

        Raises:
            ValueError: The text holds half a surrogate pair.
        """
        ...


class Frame(NamedTuple):
    """The ids around those of a text."""

    start_id: int
    end_id: int
    pad_token_id: int


def fit_words(words: Iterable[Word], text: str, max_tokens: int, frame: Frame) -> Encoding:
    """Return the ids of a text as far as they fit into `max_tokens`, in their frame.

    Args:
        words: The words of the text in order; those that do not fit are not asked for.
        text: The text that the offsets of the words refer to.
        max_tokens: How many ids to return, those of the frame included; at least 2.
        frame: Start, end and padding.

    Raises:
        ValueError: `max_tokens` is too small.
    """
    if max_tokens < 2:
        raise ValueError(f"max_tokens must be at least 2 (start and end), got {max_tokens}")
    room = max_tokens - 2
    ids: list[int] = []
    cut = ""
    for start, word_ids in words:
        ids += word_ids
        if len(ids) > room:
            cut = text[start:]
            break
    ids = [frame.start_id, *ids[:room], frame.end_id]
    padding = [frame.pad_token_id] * (max_tokens - len(ids))
    return Encoding(ids=(*ids, *padding), cut=cut)


def check_encodable(text: str) -> None:
    """Check that a text is well-formed Unicode.

    Raises:
        ValueError: It holds half a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds half a surrogate pair, {text[error.start]!r}, at position "
            f"{error.start}; pass well-formed Unicode"
        ) from error
