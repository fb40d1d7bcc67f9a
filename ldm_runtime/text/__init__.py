"""Text: prompts with weights, and the tokenizers that text encoders were trained with."""

from pathlib import Path

from ldm_runtime.text.clip import ClipTokenizer
from ldm_runtime.text.contract import Encoding, LearnedWord, Tokenizer, learned_ids
from ldm_runtime.text.vocabulary_file import read_vocabulary
from ldm_runtime.text.word_piece import WordPieceTokenizer

__all__ = [
    "ClipTokenizer",
    "Encoding",
    "LearnedWord",
    "Tokenizer",
    "WordPieceTokenizer",
    "learned_ids",
    "open_tokenizer_file",
]


def open_tokenizer_file(path: Path) -> Tokenizer:
    """Open the tokenizer that a vocabulary is for: CLIP's if it is a list of merges, else BERT's.

    Raises:
        ValueError: The file is neither; the message names the line.
    """
    if "#version" in read_vocabulary(path)[0]:
        return ClipTokenizer.from_file(path)
    return WordPieceTokenizer.from_file(path)
