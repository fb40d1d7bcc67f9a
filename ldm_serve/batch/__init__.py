"""Batches: files of requests whose images go to a folder, which any number of runs complete."""
