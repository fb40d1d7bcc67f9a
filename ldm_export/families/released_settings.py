"""The family defaults of the models of the latent-diffusion paper.

Sources: configurations, scripts, notebooks and README of CompVis/latent-diffusion (a506df5).
"""

from dataclasses import replace

from ldm_export.families.records import FamilyDefaults

#: CelebA-HQ, FFHQ and LSUN bedrooms: `sample_diffusion.py` generates with 50 steps and eta 1.
FACES = FamilyDefaults(
    task="unconditional",
    weights="ema",
    num_heads=None,
    num_head_channels=32,
    prediction_type="epsilon",
    latent_scale_factor=1.0,
    linear_start=0.0015,
    linear_end=0.0195,
    num_train_timesteps=1000,
    clip_activation="quick_gelu",
    null_class=None,
    latent_size=64,
    sampler="ddim",
    num_inference_steps=50,
    guidance_scale=1.0,
    eta=1.0,
)
_EIGHT_HEADS = replace(FACES, num_heads=8, num_head_channels=None)
CHURCHES = replace(_EIGHT_HEADS, linear_end=0.0155, latent_size=32)
#: The README's figures are of 200 steps. Guidance with a null class, if any, is as in cin256-v2.
CLASSES = replace(
    FACES, task="class-to-image", latent_size=32, num_inference_steps=200, guidance_scale=3.0
)
CLASSES_AND_NULL = replace(
    CLASSES,
    num_heads=1,
    num_head_channels=None,
    null_class=1000,
    latent_size=64,
    num_inference_steps=20,
    eta=0.0,
)
CAPTIONS = replace(FACES, task="text-to-image", num_inference_steps=100, eta=0.0)
TXT2IMG = replace(
    _EIGHT_HEADS,
    task="text-to-image",
    latent_scale_factor=0.18215,
    linear_start=0.00085,
    linear_end=0.012,
    latent_size=32,
    guidance_scale=5.0,
    eta=0.0,
)
LAYOUTS = replace(
    FACES, task="layout-to-image", linear_end=0.0205, num_inference_steps=200, eta=0.0
)
#: No released script generates these; its users have come to take 200 steps and eta 1
#: (CompVis/latent-diffusion issue 120).
SEGMENTATION_MAPS = replace(
    _EIGHT_HEADS,
    task="semantic-synthesis",
    linear_end=0.0205,
    num_inference_steps=200,
    other_latent_sizes=(128,),
)
#: The notebook leaves the steps to its caller; 100 are the default of those who built on it.
UPSCALER = replace(FACES, task="super-resolution", linear_end=0.0155, num_inference_steps=100)
INPAINTING = replace(_EIGHT_HEADS, task="inpainting", linear_end=0.0205, eta=0.0)
NEIGHBOURS = replace(
    FACES, task="retrieval", linear_end=0.015, latent_size=48, guidance_scale=5.0, eta=0.0
)
STANDALONE_AUTOENCODER = replace(
    FACES,
    task="autoencoder",
    num_head_channels=None,
    latent_size=None,
    num_inference_steps=1,
    eta=0.0,
)
