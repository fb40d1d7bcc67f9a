"""Pictures behind the latents: one to enlarge, or one with a hole to fill."""

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
    """Return concat (1, 3, h, w): the small picture itself, from -1 to 1, a latent pixel each.

    What is missing to the size of the latents repeats its right and lower edge.

    See `ldm_runtime.conditioning.encode_conditioning`.
    """
    small = request.source_image
    assert isinstance(small, WholeImage), "what is enlarged has neither mask nor margins"
    picture = to_float(small.image.pixels[None])
    height, width = latent_size(request, spec)
    missing = (0, height - picture.shape[2]), (0, width - picture.shape[3])
    return Conditioning(concat=np.pad(picture, ((0, 0), (0, 0), *missing), mode="edge"))


def encode_masked_image(
    network: OpenNetwork,
    _tokenizer: Tokenizer | None,
    request: ResolvedRequest,
    spec: ModelSpec,
) -> Conditioning:
    """Return concat (1, C + 1, h, w): the latents of the picture with its hole, then the mask.

    The latents are in the autoencoder's own scale, whatever that of those that are sampled. In the
    picture the hole is -1, black; the mask is 1 in the hole and -1 around it, and of every latent
    pixel the first pixel decides. Half a gray counts as hole from 128 on. What is missing to the
    size of the latents repeats the right and lower edge of both. Source: `scripts/inpaint.py` of
    CompVis/latent-diffusion, commit a506df5.

    See `ldm_runtime.conditioning.encode_conditioning`.
    """
    picture = init_image(request)
    assert picture is not None, "a request to inpaint has an image"
    init = picture.padded(*padded_size(request, spec))
    assert init.mask is not None, "and a mask, or margins"
    hole: Float32Array = (init.mask.gray() > 127).astype(np.float32)
    masked = np.where(hole > 0, np.float32(-1), to_float(init.picture.pixels[None]))
    latents = encode_pixels(network("vae_encoder"), masked, spec)
    factor = spec.autoencoder.factor
    mask = 2 * hole[None, None, ::factor, ::factor] - 1
    return Conditioning(concat=np.concatenate([latents, mask], axis=1))
