"""Runs of the sampler sweep: which combinations, and the measurement of one."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ldm_runtime import Generator
from ldm_runtime.requests.request import parse_request
from ldm_runtime.requests.resolution import resolve, sampler_of
from ldm_runtime.requests.resolved import ResolvedRequest
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.specs.model import ModelSpec
from measuring.rows import commit, machine
from models.shapes.data import scenes
from models.shapes.evaluation import held_out, prompts, scoring
from models.shapes.evaluation.cells import Cell

STEPS = (5, 8, 12, 16, 25, 50)
#: Cells with more denoiser calls are left out unless `--steps` asks for them.
MOST_CALLS = 60
_SETTINGS = ("sampler", "num_inference_steps", "schedule", "eta", "guidance_scale")


def run_sweep(
    generator: Generator, todo: Sequence[ResolvedRequest], captions: int
) -> Iterator[Cell]:
    """Measure a cell for each request, in order, and yield it.

    Raises:
        LdmError: A cell cannot be generated.
    """
    prompt_set = prompts.prepare_prompts(captions)
    first = scenes.caption(prompt_set.wanted[0])
    held_out.generate(generator, first, held_out.SEED, {"num_inference_steps": 1})  # warms up
    for request in todo:
        yield measure(generator, request, prompt_set)


def measure(generator: Generator, request: ResolvedRequest, prompt_set: prompts.PromptSet) -> Cell:
    """Generate and score every caption with the settings of a request."""
    fields = {name: getattr(request, name) for name in ("sampler", "num_inference_steps")}
    images, seconds = held_out.generate_all(generator, prompt_set.wanted, fields)
    return Cell(
        name="shapes_sweep",
        backend=generator.backend,
        commit=commit(),
        bundle_sha256=generator.bundle_sha256,
        device=machine(),
        settings=settings_of(request, len(prompt_set.wanted)),
        seconds=tuple(seconds),
        calls=count_calls(request),
        counts=scoring.score_all(prompt_set.wanted, images),
        distance=prompts.distance_from(prompt_set.reference, np.stack(images)),
        floor=prompt_set.floor,
    )


def plan(spec: ModelSpec, samplers: Sequence[str], steps: Sequence[int]) -> list[ResolvedRequest]:
    """Return a resolved request for each cell of the grid.

    Args:
        spec: The model.
        samplers: Names; none is all there are.
        steps: Numbers of steps; none is `STEPS` up to `MOST_CALLS`.

    Raises:
        RequestError: There is no such sampler, or it cannot take that many steps.
    """
    requests = [
        resolve(
            parse_request(
                {"prompt": "", "sampler": sampler, "num_inference_steps": count, "seed": 0}
            ),
            spec,
        )
        for sampler in samplers or SAMPLERS
        for count in steps or STEPS
    ]
    if steps:
        return requests
    return [request for request in requests if count_calls(request) <= MOST_CALLS]


def count_calls(request: ResolvedRequest) -> int:
    """Return how often a request's sampler calls the denoiser for one image.

    Counted by running it over the request's sigmas, because first and last steps may differ.
    """
    calls = 0
    nothing = np.zeros((1, 1, 1, 1), np.float32)

    def denoise(latents: npt.NDArray[np.float32], _: float) -> npt.NDArray[np.float32]:
        nonlocal calls
        calls += 1
        return latents

    run = sampler_of(request).of(lambda sigma, _: sigma)
    for _ in run(
        denoise, nothing, request.sigmas, eta=request.eta, noise_sampler=lambda *_: nothing
    ):
        pass
    return calls


def settings_of(request: ResolvedRequest, captions: int) -> dict[str, str | int | float]:
    """Return all that tells a cell of one bundle from the others."""
    settings = {name: getattr(request, name) for name in _SETTINGS}
    return settings | {"captions": captions, "layouts": prompts.LAYOUTS, "seed": held_out.SEED}
