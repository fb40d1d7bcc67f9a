"""Shared parts of the benchmarks: rows, subjects, processes, and exports that are watched."""
