"""Text from outside, such as a name in a file, escaped before it reaches a terminal."""


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


def _escaped(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]
