"""Golden outputs: what torch draws through the runtime's own loop, for `ldm verify` to redraw."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from ldm_runtime.backends import Runner
from ldm_runtime.conditioning import encode_prompts, open_tokenizer
from ldm_runtime.images import decode_latents
from ldm_runtime.manifest import ModelSpec
from ldm_runtime.request import GenerationRequest
from ldm_runtime.resolution import resolve, size_step
from ldm_runtime.sampling import batches, sample_latents

#: Drawn by every bundle. They differ in sampler, guidance, number of images and noise a step.
PROMPTS: tuple[GenerationRequest, ...] = (
    GenerationRequest(
        prompt="a large red circle left of a small blue square on a white background",
        sampler="ddim",
        seed=0,
    ),
    GenerationRequest(
        prompt="a small green triangle on a black background",
        negative_prompt="a gray background",
        sampler="dpmpp_2m",
        seed=1,
        num_images=2,
    ),
    GenerationRequest(
        prompt="a large yellow cross above a small purple circle",
        guidance_scale=1.0,
        sampler="euler_ancestral",
        seed=3,
    ),
)
_MAX_PIXELS = 256  # a side: golden outputs show that a bundle works, not how good it is
_MANY_PARAMETERS = 100_000_000
_STEPS, _FEW_STEPS = 20, 4

Array = npt.NDArray[np.float32]

#: Opens a component in torch, float32, with the checkpoint's own weights.
OpenReference = Callable[[str], Runner]


def golden_requests(spec: ModelSpec, unet_parameters: int) -> tuple[GenerationRequest, ...]:
    """Return the requests a bundle is verified with; large models draw small and few steps."""
    steps = _FEW_STEPS if unet_parameters > _MANY_PARAMETERS else _STEPS
    height, width = (
        max(size_step(spec), min(size, _MAX_PIXELS // size_step(spec) * size_step(spec)))
        for size in (spec.defaults.height, spec.defaults.width)
    )
    return tuple(
        resolve(replace(request, height=height, width=width, num_inference_steps=steps), spec)
        for request in PROMPTS
    )


def write_golden(
    folder: Path,
    requests: Sequence[GenerationRequest],
    spec: ModelSpec,
    tokenizer_file: Path,
    open_reference: OpenReference,
) -> tuple[str, ...]:
    """Draw requests with torch, one network in memory at a time, and write what came out.

    Args:
        folder: The bundle; each request gets a folder `golden/<index>` with `request.json`,
            `golden.npz` (context, latents) and one PNG an image.
        requests: Resolved requests.
        spec: The model.
        tokenizer_file: Vocabulary of its tokenizer.
        open_reference: Opens a component in torch.

    Returns:
        The folders, relative to the bundle.
    """
    contexts = _encode(open_reference, requests, spec, tokenizer_file)
    latents = _sample(open_reference, requests, spec, contexts)
    engine = open_reference("vae_decoder")
    names = tuple(f"golden/{index}" for index in range(len(requests)))
    for index, name in enumerate(names):
        place = folder / name
        place.mkdir(parents=True)
        text = msgspec.json.format(msgspec.json.encode(asdict(requests[index])), indent=1)
        (place / "request.json").write_bytes(text)
        np.savez(place / "golden.npz", context=contexts[index], latents=latents[index])
        for number, row in enumerate(latents[index]):
            (image,) = decode_latents(engine, row[None], spec)
            image.save(place / f"{number}.png")
    return names


# A network is a local variable of a function of its own, so that it is gone before the next comes.


def _encode(
    open_reference: OpenReference,
    requests: Sequence[GenerationRequest],
    spec: ModelSpec,
    tokenizer_file: Path,
) -> list[Array]:
    tokenizer = open_tokenizer(tokenizer_file, spec)
    engine = open_reference("text_encoder")
    with _quiet_cuts():
        return [encode_prompts(engine, tokenizer, request, spec) for request in requests]


def _sample(
    open_reference: OpenReference,
    requests: Sequence[GenerationRequest],
    spec: ModelSpec,
    contexts: Sequence[Array],
) -> list[Array]:
    engine = open_reference("unet")
    return [
        _draw(engine, context, request, spec)
        for context, request in zip(contexts, requests, strict=True)
    ]


def _draw(engine: Runner, context: Array, request: GenerationRequest, spec: ModelSpec) -> Array:
    rows = []
    for images in batches(request.num_images, 1):
        *_, last = sample_latents(engine, context, request, spec, images)
        rows.append(last.latents)
    return np.concatenate(rows)


@contextmanager
def _quiet_cuts() -> Iterator[None]:
    """Silence the warning about cut prompts: these prompts are nobody's, and lengths differ."""
    logger = logging.getLogger("ldm_runtime.conditioning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
