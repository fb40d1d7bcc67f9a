"""Latents: images encoded and decoded, where sampling starts, and previews without a decoder."""
