"""Tokenizers of a diffusers folder: a bundle has CLIP's own, so that one that differs is refused.

Source: `save_pretrained` of CLIPTokenizer in transformers 5, and the files that its earlier
versions wrote: words are added in `added_tokens.json` or `added_tokens_decoder`, and the padding
of `special_tokens_map.json` goes before that of a configuration without `added_tokens_decoder`.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import zip_longest
from pathlib import Path

from ldm_export.errors import CheckpointError
from ldm_export.hyperparameters.shapes import listed
from ldm_export.intake.json_files import Entries, read_json
from ldm_runtime.text.vocabulary_file import read_vocabulary

_LOGGER = logging.getLogger(__name__)

_MERGES = Path(__file__).parents[1] / "vocabularies/clip_bpe_simple_vocab_16e6.txt.gz"
_NUM_BYTES = 2 * 256  # the ids before those of merges
_VOCAB_SIZE = 49408
_END = "<|endoftext|>"
_SPECIAL = {"<|startoftext|>": _VOCAB_SIZE - 2, _END: _VOCAB_SIZE - 1}
_OTHER = "which is not exported: a bundle has CLIP's own"


def check_tokenizer(folder: Path, *, openclip: bool) -> None:
    """Check that a tokenizer splits prompts as CLIP's, and warn if its padding is another.

    Files that are not there are not missed.

    Args:
        folder: Its folder.
        openclip: Whether its text encoder is of OpenCLIP, which "!" (0) fills up; CLIP the end.

    Raises:
        CheckpointError: It has words beyond CLIP's vocabulary, another vocabulary or other merges,
            or a file is damaged.
    """
    whole, config = _entries(folder / "tokenizer.json"), _entries(folder / "tokenizer_config.json")
    model = _object(whole.get("model"))
    _check_merges(folder / "tokenizer.json", model.get("merges"))
    _check_vocabulary(folder / "tokenizer.json", _object(model.get("vocab")))
    _check_vocabulary(folder / "vocab.json", _entries(folder / "vocab.json"))
    if (folder / "merges.txt").is_file():
        _check_merges(folder / "merges.txt", _merge_lines(folder / "merges.txt"))
    decoder = _object(config.get("added_tokens_decoder"))
    words = dict(_added(whole.get("added_tokens")))
    words |= dict(_added({"id": id_, **_object(each)} for id_, each in decoder.items()))
    listed_words = _entries(folder / "added_tokens.json").items()
    words |= dict(_added({"id": id_, "content": word} for word, id_ in listed_words))
    if words:
        word = next(iter(words))
        raise CheckpointError(
            folder,
            f"adds words to CLIP's vocabulary ({listed(words)}), which a bundle does not hold; "
            "export without this folder, and give each word its learned embedding when generating: "
            f'ldm generate --textual-inversion "{word}=learned_embeds.safetensors"',
        )
    _warn_of_padding(folder, config, "!" if openclip else _END)


def _entries(path: Path) -> Entries:
    return read_json(path) if path.is_file() else {}


def _object(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _added(tokens: object) -> Iterator[tuple[str, str]]:
    """Yield the words of tokens whose ids are beyond CLIP's vocabulary, with their ids."""
    for token in tokens if isinstance(tokens, Iterable) else ():
        entries = _object(token)
        word, id_ = entries.get("content"), str(entries.get("id"))
        if isinstance(word, str) and id_.isdecimal() and int(id_) >= _VOCAB_SIZE:
            yield word, id_


@cache
def _clip_merges() -> tuple[str, ...]:
    return tuple(read_vocabulary(_MERGES)[1 : 1 + _VOCAB_SIZE - _NUM_BYTES - len(_SPECIAL)])


def _merge_lines(path: Path) -> list[str]:
    try:
        lines = read_vocabulary(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(path, f"cannot be read ({error}); get it again") from error
    return [line for line in lines if line and not line.startswith("#version")]


def _check_merges(path: Path, merges: object) -> None:
    """Check merges, each a text or a list of two symbols; None is no merges."""
    if merges is None:
        return
    pairs = merges if isinstance(merges, list) else []
    found = [" ".join(map(str, each)) if isinstance(each, list) else each for each in pairs]
    for number, (merge, own) in enumerate(zip_longest(found, _clip_merges()), start=1):
        if merge != own:
            raise CheckpointError(
                path, f"has {merge!a:.40} as merge {number}, where CLIP has {own!a:.40}, {_OTHER}"
            )


def _check_vocabulary(path: Path, ids: Entries) -> None:
    """Check the ids of merges and special tokens; an empty vocabulary is none."""
    own = {merge.replace(" ", ""): _NUM_BYTES + rank for rank, merge in enumerate(_clip_merges())}
    for token, id_ in (own | _SPECIAL).items() if ids else ():
        if ids.get(token) != id_:
            raise CheckpointError(
                path, f"gives {token!a:.40} the id {ids.get(token)!a:.40} and not {id_}, {_OTHER}"
            )


def _warn_of_padding(folder: Path, config: Entries, expected: str) -> None:
    stated = config.get("pad_token")
    if "added_tokens_decoder" not in config:
        stated = _entries(folder / "special_tokens_map.json").get("pad_token", stated)
    found = _object(stated).get("content", stated)
    if found not in (None, expected):
        _LOGGER.warning(
            "%s fills prompts up with %a, and the bundle with %a, as released models of this text "
            "encoder were trained; images differ from those of diffusers",
            folder,
            str(found)[:40],
            expected,
        )
