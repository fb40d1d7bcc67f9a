r"""Prompts that change while they are sampled: editing and alternation of AUTOMATIC1111's web UI.

    [from:to:when]   "from" up to the step `when`, then "to"; either may be empty
    [to:when]        nothing up to that step, then "to"
    [a|b|c]          "a" in the first step, "b" in the second, "c" in the third, then "a" again

`when` is the number of a step, from 1, or with a decimal point a share of the steps: 0.5 is half of
them. All of it nests, also in brackets that weigh, whose text is left as it is: `text.prompts`
reads it afterwards, step by step. A backslash before a bracket, a colon or a bar makes it text.

What is not well-formed stays text: brackets that are not closed, others around them, more colons
than these, colons next to bars, a `when` that is not a number. The results differ from the web UI's
in one point: a bar outside of brackets is text, while there it switches all of this off.

Source: AUTOMATIC1111/stable-diffusion-webui 1.10, `get_learned_conditioning_prompt_schedules` in
`modules/prompt_parser.py` (commit 28bd8e1).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from ldm_runtime.text.prompts import check_depth

_SYMBOL = re.compile(r"\\.|[()\[\]:|]|[^\\()\[\]:|]+|\\", re.DOTALL)
_WHEN = re.compile(r"\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")
_OPENING = {")": "(", "]": "["}


class ScheduledText(NamedTuple):
    """The text of a prompt up to a step, from the step after the text before it.

    Attributes:
        last_step: The last step that sees it, from 1.
        text: The text, which may have weights and breaks.
    """

    last_step: int
    text: str


def prompt_schedule(
    prompt: str, num_steps: int, *, earlier_steps: int = 0
) -> tuple[ScheduledText, ...]:
    """Return the texts of a prompt over the steps of a pass; the last one's last step is the last.

    Args:
        prompt: A prompt.
        num_steps: Steps of the pass, at least 1.
        earlier_steps: Steps of the pass before it, if there is one. Then numbers of steps count on
            from these, and the shares of this pass are those from 1 to 2.

    Raises:
        ValueError: Too many brackets are open at once.
    """
    nodes = _parse(prompt)
    timing = _Timing(num_steps, earlier_steps)
    last_steps = sorted(_last_steps(nodes, timing))
    return tuple(ScheduledText(step, _at(nodes, step, timing)) for step in last_steps)


def count_texts(prompt: str, num_steps: int) -> int:
    """Return how many texts `prompt_schedule` returns, in time linear in the length of the prompt.

    Raises:
        ValueError: Too many brackets are open at once.
    """
    return len(_last_steps(_parse(prompt), _Timing(num_steps, 0)))


@dataclass(frozen=True)
class _Edit:
    before: Sequence["_Node"]
    after: Sequence["_Node"]
    when: str


@dataclass(frozen=True)
class _Alternation:
    options: Sequence[Sequence["_Node"]]


_Node: TypeAlias = str | _Edit | _Alternation


@dataclass(eq=False)
class _Bracket:
    """An open bracket and what follows it, in sections between its colons and bars.

    Attributes:
        symbol: The bracket; empty for the whole prompt.
        sections: The nodes of each section.
        separators: The colons and bars.
        is_balanced: Whether what is inside is well-formed, so that it may be edited.
    """

    symbol: str
    sections: list[list[_Node]] = field(default_factory=lambda: [[]])
    separators: list[str] = field(default_factory=list)
    is_balanced: bool = True

    def add(self, nodes: Iterable[_Node]) -> None:
        self.sections[-1] += nodes

    def separate(self, symbol: str) -> None:
        self.separators.append(symbol)
        self.sections.append([])

    def as_text(self) -> Iterator[_Node]:
        """Yield the bracket and what follows it, as they were written."""
        yield self.symbol
        for separator, section in zip(["", *self.separators], self.sections, strict=True):
            yield separator
            yield from section

    def closed(self) -> _Node | None:
        """Return what the bracket means if it is closed here, or None if it stays as it is."""
        if not self.is_balanced or self.symbol != "[" or not self.separators:
            return None
        if {*self.separators} == {"|"}:
            return _Alternation(self.sections)
        *parts, last = self.sections
        when = _WHEN.fullmatch("".join(map(str, last)))
        if "|" in self.separators or len(parts) > 2 or when is None:
            return None
        before, after = parts if len(parts) == 2 else ([], *parts)
        return _Edit(before, after, when[1])

    def may_stay(self) -> bool:
        """Whether brackets around it may still be edited if this stays as it is."""
        most = {"(": 1, "[": 0}[self.symbol]
        return self.is_balanced and "|" not in self.separators and len(self.separators) <= most


def _parse(prompt: str) -> Sequence[_Node]:
    """Return the nodes of a prompt, in time that is linear in its length."""
    opened = [_Bracket("")]
    for match in _SYMBOL.finditer(prompt):
        symbol = match[0]
        if symbol in "([":
            check_depth(len(opened) - 1, match.start())
            opened.append(_Bracket(symbol))
        elif symbol in _OPENING:
            _close(opened, symbol)
        elif symbol in ":|" and len(opened) > 1:
            opened[-1].separate(symbol)
        else:
            opened[-1].add([symbol])
    while len(opened) > 1:
        _leave_open(opened)
    (nodes,) = opened[0].sections
    return nodes


def _close(opened: list[_Bracket], symbol: str) -> None:
    """Close the last bracket of a kind; others in it stay open, and text."""
    opening = _OPENING[symbol]
    if all(bracket.symbol != opening for bracket in opened):
        for bracket in opened:
            bracket.is_balanced = False
        opened[-1].add([symbol])
        return
    while opened[-1].symbol != opening:
        _leave_open(opened)
    bracket = opened.pop()
    node = bracket.closed()
    if node is not None:
        opened[-1].add([node])
        return
    opened[-1].add([*bracket.as_text(), symbol])
    opened[-1].is_balanced &= bracket.may_stay()


def _leave_open(opened: list[_Bracket]) -> None:
    bracket = opened.pop()
    opened[-1].add(bracket.as_text())
    opened[-1].is_balanced = False


class _Timing(NamedTuple):
    num_steps: int
    earlier_steps: int

    def last_step(self, when: str) -> int:
        """Return the last step before an edit, 0 if there is none."""
        number = float(when)
        if "." in when:
            number = (number - (1.0 if self.earlier_steps else 0.0)) * self.num_steps
        else:
            number -= self.earlier_steps
        return int(min(max(number, 0), self.num_steps))


def _last_steps(nodes: Iterable[_Node], timing: _Timing) -> set[int]:
    """Return the last step, and those before it after which the text may change."""
    found = {timing.num_steps}
    _add_last_steps(nodes, timing, found)
    return found


def _add_last_steps(nodes: Iterable[_Node], timing: _Timing, found: set[int]) -> None:
    for node in nodes:
        if len(found) == timing.num_steps:  # one alternation is enough for that
            return
        match node:
            case _Edit():
                if step := timing.last_step(node.when):
                    found.add(step)
                _add_last_steps([*node.before, *node.after], timing, found)
            case _Alternation():
                found.update(range(1, timing.num_steps))


def _at(nodes: Iterable[_Node], step: int, timing: _Timing) -> str:
    """Return the text at a step."""
    parts = []
    for node in nodes:
        match node:
            case str():
                parts.append(node)
            case _Edit():
                is_before = step <= timing.last_step(node.when)
                parts.append(_at(node.before if is_before else node.after, step, timing))
            case _Alternation():
                parts.append(_at(node.options[(step - 1) % len(node.options)], step, timing))
    return "".join(parts)
