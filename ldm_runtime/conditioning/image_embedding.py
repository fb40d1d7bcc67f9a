"""The embedding of an image as the UNet's vector, with noise on it: image variation.

Source: `ImageEmbeddingConditionedLatentDiffusion`, `CLIPEmbeddingNoiseAugmentation` and
scripts/streamlit/stableunclip.py of Stability-AI/stablediffusion (cf1d67a), after Ramesh et al.
2022 (arXiv:2204.06125).
"""

from dataclasses import replace

import numpy as np
from PIL import Image

from ldm_runtime.conditioning.contract import Conditioning, Float32Array, OpenNetwork, with_noise
from ldm_runtime.conditioning.micro_conditioning import sinusoidal_features
from ldm_runtime.conditioning.text import encode_text
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.requests.resolved import ResolvedRequest, WholeImage
from ldm_runtime.specs.model import ModelSpec, NoiseAugmentation
from ldm_runtime.specs.networks import ImageEncoderSpec
from ldm_runtime.text import Tokenizer

_STREAM = (1,)  # of a seed: not the one that latents are made of


def encode_text_and_image_embedding(
    network: OpenNetwork,
    tokenizer: Tokenizer | None,
    request: ResolvedRequest,
    spec: ModelSpec,
) -> Conditioning:
    """Return context of the prompts, and vectors (2, N, 2 * D) of N images, zeros first.

    A vector is the image's embedding of length D with noise of the request's level, then features
    of that level. Its noise depends on the seed of the image that is generated, so that image i
    does not depend on how many there are. Without guidance there are no zeros: (1, N, 2 * D).

    See `ldm_runtime.conditioning.encode_conditioning`.
    """
    source, augmentation = request.source_image, spec.noise_augmentation
    assert isinstance(source, WholeImage), "an image to vary has neither mask nor margins"
    assert augmentation is not None, "a model for image variation was trained with noise"
    pixels = clip_pixels(source.image, spec.network(ImageEncoderSpec))
    embedding = network("image_encoder").run({"pixels": pixels})["embedding"]
    seeds = (request.of_image(index).seed for index in range(request.num_images))
    noise = np.concatenate([embedding_noise(embedding.shape, seed) for seed in seeds])
    vectors = augmented_embeddings(embedding, noise, request.noise_level, augmentation)
    rows = [np.zeros_like(vectors), vectors] if request.is_guided else [vectors]
    text = encode_text(network, tokenizer, request, spec)
    image_vectors = np.stack(rows)
    return text.changed(lambda each: replace(each, image_vectors=image_vectors))


def clip_pixels(image: InputImage, spec: ImageEncoderSpec) -> Float32Array:
    """Return an image as CLIP's image encoder takes it: (1, 3, S, S), normalised.

    The shorter side is resized to S by Pillow's bicubic filter, and the middle of the longer one is
    kept. Source: `CLIPImageProcessor` of transformers, and so the released pipeline of diffusers.
    """
    side, short = spec.image_size, min(image.size)
    width, height = (side * length // short for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    resized = image.to_image().resize((width, height), Image.Resampling.BICUBIC)
    square = np.asarray(resized)[top : top + side, left : left + side]
    mean, std = (np.array(each, dtype=np.float32) for each in (spec.pixel_mean, spec.pixel_std))
    normalised: Float32Array = (square.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(normalised.transpose(2, 0, 1)[None])


def embedding_noise(shape: tuple[int, ...], seed: int) -> Float32Array:
    """Return the noise of unit variance that is added to the embedding for the image of a seed."""
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=_STREAM))
    return generator.standard_normal(shape, dtype=np.float32)


def augmented_embeddings(
    embedding: Float32Array, noise: Float32Array, noise_level: int, augmentation: NoiseAugmentation
) -> Float32Array:
    """Return the vectors (N, 2 * D) of an embedding (1, D) with noise (N, D), and of its level."""
    mean, std = (np.array(each, np.float32) for each in (augmentation.mean, augmentation.std))
    kept = augmentation.alphas_cumprod[noise_level]
    noisy = with_noise((embedding - mean) / std, noise, kept)
    level = sinusoidal_features([noise_level], embedding.shape[1])
    levels = np.broadcast_to(level, noise.shape)
    return np.concatenate([noisy * std + mean, levels], axis=1)
