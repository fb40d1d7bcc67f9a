"""Adapters such as LoRA: files of changes to a model's weights, and the layers they change."""
