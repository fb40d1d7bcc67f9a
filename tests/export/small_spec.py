"""What the checkpoint of `small_checkpoint` is, without detecting it."""

from ldm_runtime.specs.model import ModelSpec, SamplingDefaults
from ldm_runtime.specs.networks import Networks
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
