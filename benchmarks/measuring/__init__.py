"""Measuring: rows, interleaved runs, peak memory, and the ceilings of a machine."""
