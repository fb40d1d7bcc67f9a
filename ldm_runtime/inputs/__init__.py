"""Inputs that come with a request: images, masks, layouts, segmentation maps, embeddings."""
