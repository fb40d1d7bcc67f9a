"""Pipelines of diffusers over the small checkpoints, and the runtime's over the same.

The runtime's runs the networks in torch, so that no graph has to be traced.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionXLImg2ImgPipeline
from PIL import Image
from transformers import CLIPTextModelWithProjection

from ldm_export.steps import vocabulary_of
from ldm_runtime.bundle.manifest import BuildRecord
from ldm_runtime.conditioning import open_tokenizer
from ldm_runtime.pipeline.deadline import Deadline
from ldm_runtime.pipeline.image_pipeline import ImagePipeline
from ldm_runtime.pipeline.open_model import OpenModel, Origin
from ldm_runtime.requests.request import parse_request
from ldm_runtime.requests.resolution import resolve
from released.compvis_files import compvis_config
from tests.reference.small_families import SDXL_REFINER
from tests.reference.twins import (
    TRAINED,
    clip_tokenizer,
    load_autoencoder,
    load_text_encoder,
    load_unet,
)

PROMPT = "a large red circle left of a small blue square"
SEED, SIDE = 7, 64
COMMON = {
    "negative_prompt": "blurry, a dog",
    "num_inference_steps": 6,
    "guidance_scale": 5.0,
    "height": SIDE,
    "width": SIDE,
}


def ddim(prediction_type):
    return DDIMScheduler(
        **TRAINED, set_alpha_to_one=False, clip_sample=False, prediction_type=prediction_type
    )


def noise(model, count=1):
    shape = (1, model.spec.autoencoder.embed_dim, *2 * [SIDE // model.spec.autoencoder.factor])
    return torch.cat(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(SEED + index))
            for index in range(count)
        ]
    )


def generate(model, **fields):
    """Return the images of ours as arrays (N, H, W, 3) of whole numbers, 0 to 255."""
    return as_arrays(result_of(model, **fields).images)


def result_of(model, refiner=None, **fields):
    specs = [each and each.spec for each in (model, refiner)]
    request = resolve(parse_request({"sampler": "ddim", "seed": SEED, **fields}), *specs)
    pipeline = ImagePipeline(model=as_open(model), refiner=refiner and as_open(refiner))
    *_, result = pipeline.stream(request, None, Deadline(None), batch_size=request.num_images)
    return result


def as_open(model):
    vocabulary = vocabulary_of(model.spec)
    build = BuildRecord(
        checkpoint="", checkpoint_sha256="", components=(), versions={}, seconds=0.0
    )
    return OpenModel(
        network=model.network,
        tokenizer=vocabulary and open_tokenizer(vocabulary, model.spec, model.words),
        spec=model.spec,
        origin=Origin(bundle_sha256="", build=build),
    )


def as_arrays(images):
    return np.stack([np.asarray(image, dtype=np.float64) for image in images])


def lowest_psnr(ours, theirs):
    """Return the PSNR in dB of the image that differs most; a flat image is not worth comparing."""
    assert ours.shape == theirs.shape
    assert theirs.std(axis=(1, 2, 3)).min() > 25
    error = np.square(ours - theirs).mean(axis=(1, 2, 3)).max()
    return 10 * math.log10(255**2 / error) if error else math.inf


def diffusers_pipeline(kind, family, state, folder, prediction_type="epsilon"):
    """Return a pipeline of diffusers over a checkpoint with one text encoder."""
    config = compvis_config(family.unet, family.autoencoder)
    (text,) = family.text_encoders.values()
    tokenizer = clip_tokenizer(folder)
    if text.pad_token_id == 0:
        tokenizer.pad_token = "!"
    run_layers = replace(text, num_layers=text.context_layers)
    pipeline = kind(
        vae=load_autoencoder(state, config),
        text_encoder=load_text_encoder(state, run_layers, folder),
        tokenizer=tokenizer,
        unet=load_unet(state, config),
        scheduler=ddim(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def diffusers_xl_pipeline(kind, family, state, folder, **options):
    """Return a pipeline of diffusers over a checkpoint of SDXL; its refiner has no first CLIP."""
    config = compvis_config(family.unet, family.autoencoder)
    *first, second = family.text_encoders.values()
    tokenizers = [clip_tokenizer(folder) for _ in range(2)]
    tokenizers[1].pad_token = "!"
    pipeline = kind(
        vae=load_autoencoder(state, config),
        text_encoder=load_text_encoder(state, first[0], folder) if first else None,
        text_encoder_2=load_text_encoder(state, second, folder, CLIPTextModelWithProjection),
        tokenizer=tokenizers[0] if first else None,
        tokenizer_2=tokenizers[1],
        unet=load_unet(state, config),
        scheduler=ddim("epsilon"),
        add_watermarker=False,
        **options,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def diffusers_refiner_pipeline(state, folder):
    """Return diffusers' pipeline for SDXL's refiner."""
    return diffusers_xl_pipeline(
        StableDiffusionXLImg2ImgPipeline,
        SDXL_REFINER,
        state,
        folder,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )


def photo():
    """Return an image, and a mask of an ellipse a little off its centre."""
    y, x = np.mgrid[:SIDE, :SIDE]
    pixels = np.stack([x * 4, y * 4, (x * y) % 256], axis=2).astype(np.uint8)
    mask = np.where(np.hypot(x - 36, y - 28) < 20, 255, 0).astype(np.uint8)
    return Image.fromarray(pixels), Image.fromarray(mask)


def sources_of(spec):
    return {each.field: each.source for each in spec.assumptions}
