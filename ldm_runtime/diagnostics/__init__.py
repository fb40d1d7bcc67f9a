"""Diagnostics: verification against torch, inspection of files, and the state of a machine."""
