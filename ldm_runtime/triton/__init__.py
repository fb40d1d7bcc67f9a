"""A bundle as a model of NVIDIA Triton."""
