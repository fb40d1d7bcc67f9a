"""Other programs that generate images from the same weights, measured in one run with this one."""
