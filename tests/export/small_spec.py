"""What the checkpoint of `small_checkpoint` is, without detecting it."""

from ldm_runtime.specs.model import ModelSpec, SamplingDefaults
from ldm_runtime.specs.networks import DepthEstimatorSpec, Networks
from tests.export.small_checkpoint import (
    AUTOENCODER,
    SIZE,
    TEXT_ENCODER,
    UNET,
    schedule_buffers,
)

SPEC = ModelSpec(
    family="stable-diffusion-1",
    task="text-to-image",
    weights="model",
    alphas_cumprod=tuple(schedule_buffers()["alphas_cumprod"].tolist()),
    edm=None,
    prediction_type="epsilon",
    null_prompt="encoded",
    noise_augmentation=None,
    scales_image=False,
    defaults=SamplingDefaults(
        height=SIZE,
        width=SIZE,
        sampler="ddim",
        schedule=None,
        num_inference_steps=4,
        guidance_scale=7.5,
        eta=0.0,
    ),
    label_names=(),
    assumptions=(),
    networks=Networks(unet=UNET, autoencoder=AUTOENCODER, text_encoder=TEXT_ENCODER),
)
#: A grid of 4 by 4 tokens: images of 64 by 64 pixels.
DEPTH_ESTIMATOR = DepthEstimatorSpec(
    image_channels=3,
    stem_channels=32,
    level_channels=(128, 128, 256),
    bottleneck_channels=(32, 32, 64),
    level_blocks=(1, 2, 1),
    width=128,
    num_heads=2,
    feed_forward_dim=256,
    grid=4,
    fusion_channels=32,
    head_channels=32,
)
