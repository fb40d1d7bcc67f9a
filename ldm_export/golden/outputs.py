"""Golden outputs: torch's images from the runtime's own loop, which `ldm verify` compares with."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ldm_export.golden.one_network import OneNetwork, OpenReference
from ldm_export.golden.sheet import contact_sheet
from ldm_runtime.backends.networks import FiniteOutputs
from ldm_runtime.conditioning import open_tokenizer
from ldm_runtime.diagnostics.golden_requests import SHEET_FILE, golden_latents, save_golden_request
from ldm_runtime.latents.codec import decode_latents
from ldm_runtime.pipeline.passes import ImagePasses, open_passes
from ldm_runtime.requests.resolved import ResolvedRequest
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.tasks import task_record

OUTPUTS_FILE = "golden.npz"

Float32Array = npt.NDArray[np.float32]


def golden_folders(requests: Sequence[ResolvedRequest]) -> tuple[str, ...]:
    """Return the folder of each request and its outputs, relative to the bundle."""
    return tuple(f"golden/{index}" for index in range(len(requests)))


def write_golden(
    folder: Path,
    requests: Sequence[ResolvedRequest],
    spec: ModelSpec,
    vocabulary: Path | None,
    open_reference: OpenReference,
) -> None:
    """Generate requests with torch, one network in memory at a time, and write the outputs.

    Images are as the decoder returns them: nothing is cropped, and when inpainting nothing of the
    input image is put back.

    Args:
        folder: The bundle; each request gets one of `golden_folders` with the request and its input
            files, `golden.npz` (latents) and one PNG per image. A contact sheet shows them all.
        requests: The requests.
        spec: The model.
        vocabulary: Vocabulary of its tokenizer, or None without prompts.
        open_reference: Opens a component in torch.
    """
    network = OneNetwork(lambda name: FiniteOutputs(name=name, runner=open_reference(name)))
    all_passes = _open_all_passes(network, requests, spec, vocabulary)
    latents = [_latents(network, passes) for passes in all_passes]
    images = []
    for name, request, generated in zip(golden_folders(requests), requests, latents, strict=True):
        place = folder / name
        save_golden_request(place, request.as_request())
        np.savez(place / OUTPUTS_FILE, allow_pickle=False, latents=generated)
        for number, sample in enumerate(generated):
            (image,) = decode_latents(network("vae_decoder"), sample[None], spec)
            image.save(place / f"{number}.png")
            images.append(image)
    contact_sheet(images).save(folder / SHEET_FILE)


def _open_all_passes(
    network: OneNetwork,
    requests: Sequence[ResolvedRequest],
    spec: ModelSpec,
    vocabulary: Path | None,
) -> list[ImagePasses]:
    """Return the passes that generate each request, with its conditioning."""
    tokenizer = None if vocabulary is None else open_tokenizer(vocabulary, spec)
    with _quiet_cuts():
        return [open_passes(network, tokenizer, request, spec) for request in requests]


def _latents(network: OneNetwork, passes: ImagePasses) -> Float32Array:
    """Sample every image of a request alone; an autoencoder only has the encoded latents."""
    if not task_record(passes.spec).samples:
        assert passes.start is not None, "an autoencoder has an image to encode"
        return passes.start.latents
    return golden_latents(network("unet"), passes)


@contextmanager
def _quiet_cuts() -> Iterator[None]:
    """Silence the warning about cut prompts: these are not the user's, and lengths differ."""
    logger = logging.getLogger("ldm_runtime.conditioning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
