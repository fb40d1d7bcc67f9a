"""Images concatenated to the latents: to upscale, to edit, or with a masked region to fill."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ldm_runtime.conditioning.contract import Conditioning, Float32Array, OpenNetwork, with_noise
from ldm_runtime.conditioning.text import encode_text
from ldm_runtime.latents.codec import encode_pixels, to_float, to_unet_scale
from ldm_runtime.latents.init_image import init_image
from ldm_runtime.requests.resolved import ResolvedRequest, WholeImage
from ldm_runtime.requests.sizes import latent_size, padded_size
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.text import Tokenizer

_AUGMENTATION = (0, 1)  # a seed of two numbers: no request's noise begins so


def encode_low_resolution(
    _network: OpenNetwork,
    _tokenizer: Tokenizer | None,
    request: ResolvedRequest,
    spec: ModelSpec,
) -> Conditioning:
    """Return concat (1, 3, h, w): the small image itself, from -1 to 1, one pixel per latent pixel.

    It is padded to the size of the latents by repeating its right and lower edge.

    See `ldm_runtime.conditioning.encode_conditioning`.
    """
    small = request.source_image
    assert isinstance(small, WholeImage), "an image to upscale has neither mask nor margins"
    image = to_float(small.image.pixels[None])
    height, width = latent_size(request, spec)
    missing = (0, height - image.shape[2]), (0, width - image.shape[3])
    return Conditioning(concat=np.pad(image, ((0, 0), (0, 0), *missing), mode="edge"))


def encode_text_and_low_resolution(
    network: OpenNetwork,
    tokenizer: Tokenizer | None,
    request: ResolvedRequest,
    spec: ModelSpec,
) -> Conditioning:
    """Return context of the prompts, the noise level as a class, and concat (1, 3, h, w).

    The small image has noise of that level, the same in every request, so that image i does not
    depend on how many there are. It is not made of the numbers that latents are. Source:
    `ImageConcatWithNoiseAugmentation` in ldm/modules/diffusionmodules/upscaling.py of
    Stability-AI/stablediffusion, commit cf1d67a.

    See `ldm_runtime.conditioning.encode_conditioning`.
    """
    image = encode_low_resolution(network, tokenizer, request, spec).concat
    assert image is not None, "it returns nothing else"
    noise = augmentation_noise(image.shape)
    class_labels = np.array([request.noise_level], dtype=np.int64)
    concat = with_noise(image, noise, augmentation_alphas()[request.noise_level])
    text = encode_text(network, tokenizer, request, spec)
    return text.changed(lambda each: replace(each, class_labels=class_labels, concat=concat))


def augmentation_alphas() -> npt.NDArray[np.float64]:
    """Return the share of the image, squared, at every noise level: (1000,).

    The betas are linear in their square root, as those of a UNet, but other ones.
    """
    betas = np.linspace(1e-4**0.5, 0.02**0.5, 1000, dtype=np.float64) ** 2
    return np.cumprod(1 - betas).astype(np.float64)


def augmentation_noise(shape: tuple[int, ...]) -> Float32Array:
    """Return the noise of unit variance that is added to an image to enlarge."""
    generator = np.random.default_rng(_AUGMENTATION)
    return generator.standard_normal(shape, dtype=np.float32)


def encode_masked_image(
    network: OpenNetwork,
    _tokenizer: Tokenizer | None,
    request: ResolvedRequest,
    spec: ModelSpec,
) -> Conditioning:
    """Return concat (1, C + 1, h, w): the latents of the masked image, then the mask.

    The latents are unscaled, as the autoencoder has them. The masked region is -1, black, in the
    image; the mask is 1 there and -1 elsewhere, and has the value of the first pixel of every
    latent pixel. Gray counts as masked from 128 on. Image and mask are padded to the size of the
    latents by repeating their right and lower edge. Source: `scripts/inpaint.py` of
    CompVis/latent-diffusion, commit a506df5.

    See `ldm_runtime.conditioning.encode_conditioning`.
    """
    pixels, region = _masked_pixels(request, spec)
    masked = np.where(region > 0, np.float32(-1), pixels)
    latents = encode_pixels(network("vae_encoder"), masked, spec)
    mask = 2 * _first_pixels(region, spec) - 1
    return Conditioning(concat=np.concatenate([latents, mask], axis=1))


def encode_text_and_masked_image(
    network: OpenNetwork,
    tokenizer: Tokenizer | None,
    request: ResolvedRequest,
    spec: ModelSpec,
) -> Conditioning:
    """Return the context of the prompts, and concat (1, 1 + C, h, w): mask, then masked latents.

    Unlike in `encode_masked_image`, latents are in the UNet's scale, the masked region is 0, gray,
    in the image, and the mask is 1 there and 0 elsewhere. Source: `inpaint_st.py` of
    runwayml/stable-diffusion, commit 08ab4d3, which samples the latents of the masked image where
    these are their mean.

    See `ldm_runtime.conditioning.encode_conditioning`.
    """
    pixels, region = _masked_pixels(request, spec)
    masked = np.where(region > 0, np.float32(0), pixels)
    unscaled = encode_pixels(network("vae_encoder"), masked, spec)
    latents = to_unet_scale(unscaled, spec.autoencoder)
    concat = np.concatenate([_first_pixels(region, spec), latents], axis=1)
    text = encode_text(network, tokenizer, request, spec)
    return text.changed(lambda each: replace(each, concat=concat))


def encode_text_and_image(
    network: OpenNetwork,
    tokenizer: Tokenizer | None,
    request: ResolvedRequest,
    spec: ModelSpec,
) -> Conditioning:
    """Return context (K, T, D) of the prompts, and concat (K, C, h, w): the image to edit.

    K is the number of samples that guidance asks for, see `requests.guidance`. Only the last one
    sees the prompt, the others the negative prompt; one that sees nothing has zeros in place of the
    image. Latents are unscaled, as the autoencoder has them, or in the UNet's scale if the model
    says so. The image is padded to their size by repeating its right and lower edge. Source:
    `edit_cli.py` of timothybrooks/instruct-pix2pix, commit 0dffd1e; of CosXL-Edit diffusers'
    `StableDiffusionXLInstructPix2PixPipeline`.

    See `ldm_runtime.conditioning.encode_conditioning`.
    """
    source = init_image(request, spec)
    assert source is not None, "a request to edit has an image"
    pixels = source.padded(*padded_size(request, spec)).image.pixels
    latents = encode_pixels(network("vae_encoder"), to_float(pixels[None]), spec)
    if spec.scales_image:
        latents = to_unet_scale(latents, spec.autoencoder)
    samples = request.guidance.samples
    rows = [-1 if seen == "everything" else 0 for seen in samples]
    concat = np.concatenate(
        [np.zeros_like(latents) if seen == "nothing" else latents for seen in samples]
    )

    def of_samples(text: Conditioning) -> Conditioning:
        assert text.context is not None, "a model with prompts has cross-attention"
        vector = None if text.vector is None else text.vector[rows]
        return replace(text, context=text.context[rows], vector=vector, concat=concat)

    return encode_text(network, tokenizer, request, spec).changed(of_samples)


def _masked_pixels(request: ResolvedRequest, spec: ModelSpec) -> tuple[Float32Array, Float32Array]:
    """Return an image (1, 3, H, W) from -1 to 1, padded, and its region (H, W), 1 where masked."""
    source = init_image(request, spec)
    assert source is not None, "a request to inpaint has an image"
    init = source.padded(*padded_size(request, spec))
    assert init.mask is not None, "and a mask, or margins"
    region: Float32Array = (init.mask.gray() > 0).astype(np.float32)  # its mask has two colours
    return to_float(init.image.pixels[None]), region


def _first_pixels(region: Float32Array, spec: ModelSpec) -> Float32Array:
    """Return the first pixel of every latent pixel of a region (H, W): (1, 1, h, w)."""
    factor = spec.autoencoder.factor
    return region[None, None, ::factor, ::factor]
