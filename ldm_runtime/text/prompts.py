r"""The prompt syntax of AUTOMATIC1111's web UI: weights, breaks, and chunks of a long prompt.

    (word)      1.1 times the weight        \( \) \[ \] \\   the character itself
    (word:1.3)  1.3 times the weight        BREAK            what follows starts a new chunk
    [word]      the weight divided by 1.1

Brackets nest and their weights multiply. One that is never closed reaches to the end; one that was
never opened is text; the two kinds do not see each other. A backslash before anything else
vanishes. Text is parted wherever the weight changes (of a backslash that vanishes, too), and each
part is tokenized alone.

Source: AUTOMATIC1111/stable-diffusion-webui 1.10, `modules/prompt_parser.py` (commit 28bd8e1) and
`tokenize_line` of `modules/sd_hijack_clip.py`. The results differ from it in three points: `BREAK`
breaks inside brackets too (there it becomes a word of negative weight), `(a:1.2.3)` is text in
brackets (there it is a crash), and there are limits to nesting and weights.

The web UI reads more before it reads this. Prompt editing `[a:b:0.4]` and alternation `[a|b]` are
read by `text.prompt_editing`; composition with `AND` and `<lora:name:1>` are not. `unread_syntax`
finds these, and editing that is not well-formed, for a warning. Such text is no error and means
what the rules above make of it: `[a:b:c:0.4]` is "a:b:c:0.4" with its weight divided by 1.1.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

MAX_OPEN_BRACKETS = 100  # 1.1^100 is 13,781
MAX_WEIGHT = 1e6
#: A chunk that is full ends at its last comma if that is among this many of its last tokens.
COMMA_REACH = 20

_SYMBOL = re.compile(
    r"""
      \\[()\[\]\\]?                                     # an escaped character, or nothing
    | :\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)
    | [()\[\]:]
    | [^\\()\[\]:]+
    """,
    re.VERBOSE,
)
_UNREAD = {
    "an extra network": re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE),
    "prompt editing": re.compile(r"(?<!\\)\[[^\[\]]*:\s*\d*\.?\d+\s*\]"),
    "alternation": re.compile(r"(?<!\\)\[[^\[\]]*\|[^\[\]]*\]"),
    "composition": re.compile(r"\bAND\b"),
}
_BREAK = re.compile(r"\bBREAK\b")
_CLOSING = {")": ("(", 1.1), "]": ("[", 1 / 1.1)}


@dataclass(frozen=True)
class Fragment:
    """A stretch of a prompt, with the weight of all its tokens."""

    text: str
    weight: float


@dataclass(frozen=True)
class Token:
    """One token of a prompt.

    Attributes:
        id: Its id.
        weight: Its weight.
        following: How many tokens after it are of the same learned word, which is never parted.
    """

    id: int
    weight: float
    following: int = 0


def parse_prompt(text: str) -> tuple[tuple[Fragment, ...], ...]:
    """Read the syntax of a prompt: for each part between two breaks, its fragments in order.

    There is always at least one part; a part without text has no fragments.

    Raises:
        ValueError: Too many brackets are open at once, or a weight is too large.
    """
    texts: list[str | None] = []  # None is a break
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        weights[start:] = [weight * factor for weight in weights[start:]]

    for symbol in _SYMBOL.finditer(text):
        closing = _closing(symbol)
        if symbol[0] in opened:
            check_depth(sum(map(len, opened.values())), symbol.start())
            opened[symbol[0]].append(len(texts))
        elif closing and opened[closing[0]]:
            close(*closing)
        else:
            texts += [symbol[0][1:]] if symbol[0][0] == "\\" else _split_at_breaks(symbol[0])
            weights += [1.0] * (len(texts) - len(weights))
    for bracket, factor in _CLOSING.values():
        while opened[bracket]:
            close(bracket, factor)
    return tuple(_parts(texts, weights))


def unread_syntax(text: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the first occurrence of each syntax that is not read.

    Args:
        text: A text of `prompt_editing.prompt_schedule`, in which all editing is read that can be.
    """
    for name, pattern in _UNREAD.items():
        if found := pattern.search(text):
            yield name, found[0]


def split_chunks(
    parts: Sequence[Sequence[Token]], room: int, comma_id: int
) -> list[tuple[Token, ...]]:
    """Distribute the tokens of a prompt over chunks of at most `room` tokens.

    Every part starts a chunk. A chunk that overflows ends after its last comma if that is near (see
    `COMMA_REACH`), so that what the commas part stays together. A learned word that does not fit
    starts a chunk. A break at the end adds no chunk.

    Args:
        parts: Tokens of each part of `parse_prompt`, at least one part.
        room: Tokens of a chunk, without start and end; at least 1.
        comma_id: Token of a comma that stands alone.
    """
    if room < 1:
        raise ValueError(f"room must be at least 1 token, got {room}")
    *broken, last = parts
    chunks = [chunk for part in broken for chunk in _split_part(part, room, comma_id)]
    if last or not chunks:
        chunks += _split_part(last, room, comma_id)
    return chunks


def _closing(symbol: re.Match[str]) -> tuple[str, float] | None:
    """Return the bracket that a symbol would close, and what it multiplies the weight with."""
    if symbol["weight"] is not None:
        return "(", float(symbol["weight"])
    return _CLOSING.get(symbol[0])


def check_depth(depth: int, position: int) -> None:
    """Bound the work, which is brackets times fragments."""
    if depth >= MAX_OPEN_BRACKETS:
        raise ValueError(
            f"{depth} brackets are open at character {position}; close some, or write \\( and \\[ "
            "for the characters themselves"
        )


def _split_at_breaks(text: str) -> Iterator[str | None]:
    """Yield what lies between breaks, without the white space at them, and None for each break."""
    parts = _BREAK.split(text)
    for index, part in enumerate(parts):
        if index > 0:
            yield None
            part = part.lstrip()
        yield part if index == len(parts) - 1 else part.rstrip()


def _parts(texts: Sequence[str | None], weights: Sequence[float]) -> Iterator[tuple[Fragment, ...]]:
    """Join neighbours of one weight, between breaks."""
    pieces = zip(texts, weights, strict=True)
    fragments: list[Fragment] = []
    for (is_break, weight), group in groupby(pieces, key=lambda each: (each[0] is None, each[1])):
        joined = [text or "" for text, _ in group]
        if is_break:
            for _ in joined:
                yield tuple(fragments)
                fragments = []
        elif text := "".join(joined):
            _check_weight(text, weight)
            fragments.append(Fragment(text, weight))
    yield tuple(fragments)


def _check_weight(text: str, weight: float) -> None:
    if not abs(weight) <= MAX_WEIGHT:  # which NaN never is
        shown = text if len(text) <= 40 else f"{text[:39]}…"
        raise ValueError(
            f"the weight of {shown!r} is {weight:g}, beyond {MAX_WEIGHT:g}; choose one near 1"
        )


def _split_part(tokens: Sequence[Token], room: int, comma_id: int) -> list[tuple[Token, ...]]:
    chunks: list[list[Token]] = [[]]
    for token in tokens:
        if len(chunks[-1]) == room:
            whole = 0 if token.id == comma_id else _after_comma(chunks[-1], comma_id)
            chunks[-1:] = [chunks[-1][: room - whole], chunks[-1][room - whole :]]
        if len(chunks[-1]) + token.following >= room:
            chunks.append([])
        chunks[-1].append(token)
    return [tuple(chunk) for chunk in chunks]


def _after_comma(chunk: Sequence[Token], comma_id: int) -> int:
    """Count the tokens after the last comma in reach; 0 if there is none."""
    for count, token in enumerate(reversed(chunk[-COMMA_REACH:])):
        if token.id == comma_id:
            return count
    return 0
