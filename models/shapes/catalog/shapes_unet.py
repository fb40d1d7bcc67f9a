"""The UNet of the shapes model. Without torch: its descendants are named by it, too."""

from ldm_runtime.testing import unet_spec

#: The lowest level has 4x4 pixels: seen from there, left and right of a scene are neighbours.
UNET = unet_spec(
    model_channels=64,
    channel_mult=(1, 1, 2),
    num_res_blocks=1,
    transformer_depth=(0, 1, 1),
    context_dim=64,
)
