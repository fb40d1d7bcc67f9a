"""Measurement of a bundle: time and memory of an image, part by part, on this machine."""
