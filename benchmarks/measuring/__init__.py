"""Measuring: rows, interleaved runs, peak memory, and what a machine can do at most."""
