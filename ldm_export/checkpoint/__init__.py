"""Checkpoint files, read without running any code that they contain."""
