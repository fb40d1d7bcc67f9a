"""Errors of the parsers of tensor files, which know bytes and not the file that they are from."""


class FormatError(ValueError):
    """Bytes from outside are not what their format demands.

    The caller, who opened the file, turns it into an error that names the file.
    """


class CutOffError(FormatError):
    """Bytes from outside end before what they announce does."""
