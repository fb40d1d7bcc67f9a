"""Files of tensors: safetensors and the formats of torch, read without torch and without trust."""
