"""Training: autoencoders, conditioners and UNets of the catalog."""
