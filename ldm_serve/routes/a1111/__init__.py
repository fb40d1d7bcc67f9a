"""AUTOMATIC1111's API, which programs around its web UI call, below `/sdapi/v1`."""
