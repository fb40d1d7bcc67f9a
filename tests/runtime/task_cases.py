"""What the requests of every task need, for models of `ldm_runtime.testing.tiny_spec`."""

import numpy as np

#: Sizes of these models are multiples of 4 pixels, and latents half as large.
PICTURE = np.zeros((24, 32, 3), dtype=np.uint8)
MAP = np.arange(24 * 32, dtype=np.uint8).reshape(24, 32) % 6
BOX = {"label": 3, "box": [0.25, 0.0, 1.0, 0.5]}

NEEDED = {
    "unconditional": {},
    "class-to-image": {"class_label": 2},
    "text-to-image": {"prompt": "a red circle"},
    "layout-to-image": {"layout": [BOX]},
    "semantic-synthesis": {"segmentation": MAP},
    "super-resolution": {"image": PICTURE},
    "text-super-resolution": {"prompt": "red", "image": PICTURE},
    "inpainting": {"image": PICTURE, "mask_image": PICTURE},
    "text-inpainting": {"prompt": "red", "image": PICTURE, "mask_image": PICTURE},
    "image-editing": {"prompt": "make it red", "image": PICTURE},
    "image-variation": {"image": PICTURE},
    "depth-to-image": {"prompt": "red", "depth_map": MAP},
    "retrieval": {"embeddings": np.eye(3, 8, dtype=np.float32)},
    "autoencoder": {"image": PICTURE},
}
