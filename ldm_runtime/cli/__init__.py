"""The command `ldm`, with one module per part."""

from ldm_runtime.cli.commands import main

__all__ = ["main"]
