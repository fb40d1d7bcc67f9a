"""Intake of models that lie in several files: their tensors under the names of a single file."""
