"""TensorRT engines of a bundle: build specs, builds without torch, and storage."""
