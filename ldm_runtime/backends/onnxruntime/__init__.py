"""ONNX Runtime as a backend: on the CPU, with CUDA, and with its TensorRT providers."""
