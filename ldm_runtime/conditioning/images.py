"""Images concatenated to the latents: one to upscale, or one with a masked region to fill."""

import numpy as np

from ldm_runtime.conditioning.contract import Conditioning, Float32Array, OpenNetwork
from ldm_runtime.latents.codec import encode_pixels, to_float
from ldm_runtime.latents.init_image import init_image
from ldm_runtime.requests.resolved import ResolvedRequest, WholeImage
from ldm_runtime.requests.sizes import latent_size, padded_size
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.text import Tokenizer


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
    source = init_image(request, spec)
    assert source is not None, "a request to inpaint has an image"
    init = source.padded(*padded_size(request, spec))
    assert init.mask is not None, "and a mask, or margins"
    region: Float32Array = (init.mask.gray() > 0).astype(np.float32)  # its mask has two colours
    masked = np.where(region > 0, np.float32(-1), to_float(init.image.pixels[None]))
    latents = encode_pixels(network("vae_encoder"), masked, spec)
    factor = spec.autoencoder.factor
    mask = 2 * region[None, None, ::factor, ::factor] - 1
    return Conditioning(concat=np.concatenate([latents, mask], axis=1))
