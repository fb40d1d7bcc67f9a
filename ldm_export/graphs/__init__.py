"""ONNX graphs: tracing, rewriting, precision, weights on disk, and parity with torch."""
