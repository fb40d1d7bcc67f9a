"""Evaluation: the detector, metrics, held-out prompts, and the sampler sweep."""
