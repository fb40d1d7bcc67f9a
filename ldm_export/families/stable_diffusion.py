"""Rows of the family table: Stable Diffusion and its descendants.

Sources: the released configurations of CompVis/stable-diffusion (21f890f9),
Stability-AI/stablediffusion (cf1d67a) and Stability-AI/generative-models (0ad7de9).
"""

from types import MappingProxyType

from ldm_export.families.records import AUTOENCODER, CLIP, UNET, Family, FamilyDefaults, recognised

STABLE_DIFFUSION_1 = Family(
    name="stable-diffusion-1",
    features=MappingProxyType(
        {
            "attention": "transformer",
            "projection": "convolution",
            "conditioning_channels": 0,
            "vector": "none",
            "autoencoder": "kl",
            "conditioner": "clip",
            "extra": "none",
        }
    ),
    family_defaults=FamilyDefaults(
        task="text-to-image",
        weights="model",
        num_heads=8,
        num_head_channels=None,
        prediction_type="epsilon",
        latent_scale_factor=0.18215,
        linear_start=0.00085,
        linear_end=0.012,
        num_train_timesteps=1000,
        clip_activation="quick_gelu",
        null_class=None,
        latent_size=64,
        sampler="ddim",
        # 16 are as good as many in docs/quality.md; half as many again, for richer images.
        num_inference_steps=25,
        guidance_scale=7.5,
        eta=0.0,
    ),
    assignments=UNET + AUTOENCODER + CLIP,
)

SD_FAMILIES: tuple[Family, ...] = (
    STABLE_DIFFUSION_1,
    recognised(
        "stable-diffusion-1-inpainting",
        projection="convolution",
        conditioning_channels=5,
        autoencoder="kl",
        conditioner="clip",
    ),
    recognised(
        "instruct-pix2pix",
        projection="convolution",
        conditioning_channels=4,
        autoencoder="kl",
        conditioner="clip",
    ),
    recognised(
        "stable-diffusion-2",
        projection="linear",
        conditioning_channels=0,
        vector="none",
        conditioner="openclip",
    ),
    recognised(
        "stable-diffusion-2 in sgm format",
        projection="linear",
        conditioning_channels=0,
        vector="none",
        conditioner="openclip (sgm)",
    ),
    recognised(
        "stable-diffusion-2-inpainting",
        projection="linear",
        conditioning_channels=5,
        conditioner="openclip",
    ),
    recognised(
        "stable-diffusion-2-depth",
        projection="linear",
        conditioning_channels=1,
        conditioner="openclip",
    ),
    recognised(
        "stable-diffusion-x4-upscaler",
        projection="linear",
        conditioning_channels=3,
        vector="embedding",
        conditioner="openclip",
    ),
    recognised("stable-diffusion-2-unclip-h", projection="linear", vector="mlp", vector_width=2048),
    recognised("stable-diffusion-2-unclip-l", projection="linear", vector="mlp", vector_width=1536),
    recognised(
        "stable-diffusion-xl",
        projection="linear",
        conditioning_channels=0,
        conditioner="clip + openclip",
    ),
    recognised(
        "stable-diffusion-xl-inpainting",
        projection="linear",
        conditioning_channels=5,
        conditioner="clip + openclip",
    ),
    recognised("stable-diffusion-xl-refiner", projection="linear", vector="mlp", vector_width=2560),
    # What is left of a kind, whatever its size.
    recognised("a latent diffusion model with label embeddings", vector="embedding"),
    recognised("a latent diffusion model with vector conditioning", vector="mlp"),
)
