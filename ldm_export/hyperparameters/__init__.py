"""Hyperparameters of each network, read from the shapes of its tensors."""
