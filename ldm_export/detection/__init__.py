"""Detection: from tensors and a configuration to the specification of a model."""
