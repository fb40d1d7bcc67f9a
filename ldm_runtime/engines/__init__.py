"""TensorRT engines of a bundle: what to build, building it without torch, and storing it."""
