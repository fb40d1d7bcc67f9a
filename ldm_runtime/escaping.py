"""Text from outside, such as a name in a file, escaped before it reaches a terminal."""

from collections.abc import Mapping

_LONG = 500  # characters of a value of metadata, which may be an image


def printable(value: object) -> str:
    """Return a value as one line of text in which nothing can steer a terminal.

    Every character that Unicode does not call printable (control characters, line ends, marks that
    change the direction of writing, lone surrogates) is written as Python would escape it.
    """
    text = str(value)
    return text if text.isprintable() else "".join(map(_escaped, text))


def printable_lines(text: str) -> str:
    """Return a text of several lines with every line `printable`."""
    return "\n".join(map(printable, text.split("\n")))


def shortened(metadata: Mapping[str, str]) -> dict[str, str] | None:
    """Return a file's own metadata without the rest of long values, or None if it has none."""
    return {
        name: value if len(value) <= _LONG else f"{value[:_LONG]}… ({len(value):,} characters)"
        for name, value in metadata.items()
    } or None


def _escaped(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]
