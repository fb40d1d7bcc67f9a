"""Specifications: hyperparameters of a model, its components, and the table of tasks."""
