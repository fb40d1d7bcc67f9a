"""The command `ldm`, a module for each part of it."""

from ldm_runtime.cli.commands import main

__all__ = ["main"]
