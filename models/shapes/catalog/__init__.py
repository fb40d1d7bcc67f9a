"""Catalog: every model that is trained here, its hyperparameters and training configuration."""
