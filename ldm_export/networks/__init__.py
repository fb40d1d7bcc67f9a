"""The networks as torch modules whose parameter names are the checkpoint's."""
