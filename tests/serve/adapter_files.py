"""Files of adapters for the small model of the tests, with the names that kohya's trainers give."""

import numpy as np
from safetensors.numpy import save_file

_BLOCK = "lora_unet_mid_block_attentions_0_transformer_blocks_0_"
#: Layers of 64 inputs and 64 outputs: of the UNet, and of the text encoder.
LAYERS = (
    *(f"{_BLOCK}{name}" for name in ("attn1_to_q", "attn1_to_v", "attn2_to_k", "attn2_to_v")),
    "lora_te_text_model_encoder_layers_0_self_attn_v_proj",
)
RANK, WIDTH = 4, 64


def write_lora(path, seed=0, *, width=WIDTH, layers=LAYERS, strength=0.3, metadata=None):
    """Write a random LoRA and return its path."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in layers:
        tensors[f"{layer}.lora_down.weight"] = rng.standard_normal((RANK, width), np.float32)
        up = strength * rng.standard_normal((width, RANK), np.float32)
        tensors[f"{layer}.lora_up.weight"] = up
        tensors[f"{layer}.alpha"] = np.float32([RANK])
    save_file(tensors, path, metadata)
    return path
