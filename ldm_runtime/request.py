"""The one record behind the Python call, the command line and the metadata of a PNG."""

import math
import numbers
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from types import MappingProxyType
from typing import TypeVar

from ldm_runtime.errors import BundleError, RequestError
from ldm_runtime.manifest import ModelSpec
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import SCHEDULES, sampling_sigmas, training_sigmas

MAX_SEED = 2**64 - 1
MAX_SIDE = 16384
MAX_STEPS = 100_000
MAX_IMAGES = 10_000

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What to draw. Fields left at None take the bundle's default.

    Attributes:
        prompt: What to draw.
        negative_prompt: What to steer away from; used where guidance is on.
        height: Pixels; a multiple of the size step of the bundle.
        width: Pixels, likewise.
        num_inference_steps: Steps of the sampler, at least 1.
        guidance_scale: Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598);
            1 is the plain conditional model, at half the work.
        sampler: Name in `ldm_runtime.samplers.SAMPLERS`.
        schedule: Name in `ldm_runtime.schedules.SCHEDULES`; None is the sampler's own.
        eta: Share of fresh noise a step, 0 deterministic to 1 ancestral, for samplers that have it.
        seed: Image i draws its noise from seed + i. None draws a seed and records it.
        num_images: How many pictures.
        plain_prompt: Take prompts literally: no weights `(word:1.2)`, no `BREAK`, cut where the
            text encoder ends.

    Raises:
        RequestError: A field has the wrong type or lies out of range.
    """

    prompt: str
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    schedule: str | None = None
    eta: float | None = None
    seed: int | None = None
    num_images: int = 1
    plain_prompt: bool = False

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is not None or name in _REQUIRED:
                object.__setattr__(self, name, check(name, value))
        if self.seed is not None and self.seed + self.num_images - 1 > MAX_SEED:
            raise RequestError("seed", f"{self.seed} + num_images exceeds {MAX_SEED}; lower it")


def parse_request(mapping: Mapping[str, object]) -> GenerationRequest:
    """Return the request that `mapping` (JSON, keywords) describes; nothing is converted.

    Raises:
        RequestError: A field is unknown, missing, of the wrong type or out of range.
    """
    names = [field.name for field in fields(GenerationRequest)]
    for name in mapping:
        if name not in names:
            raise RequestError(str(name), f"unknown field; a request has {', '.join(names)}")
    if "prompt" not in mapping:
        raise RequestError("prompt", "is required; say what to draw")
    # The record checks every value itself, so that Python, the command line and JSON agree.
    return GenerationRequest(**mapping)  # type: ignore[arg-type]


def resolve(request: GenerationRequest, spec: ModelSpec) -> GenerationRequest:
    """Return `request` with every field filled in and checked against a model.

    Resolving a resolved request changes nothing, and the result is all that decides a picture.

    Raises:
        RequestError: The model cannot do what the request asks for.
    """
    defaults = spec.defaults
    request = replace(
        request,
        height=_first(request.height, defaults.height),
        width=_first(request.width, defaults.width),
        num_inference_steps=_first(request.num_inference_steps, defaults.num_inference_steps),
        guidance_scale=_first(request.guidance_scale, defaults.guidance_scale),
        sampler=_first(request.sampler, defaults.sampler),
        # 32 bits, because torch's generator uses no more; short enough to read out.
        seed=_first(request.seed, secrets.randbelow(2**32 - MAX_IMAGES)),
    )
    record = SAMPLERS[str(request.sampler)]
    request = replace(
        request,
        schedule=_first(request.schedule, record.schedule),
        eta=_first(request.eta, record.default_eta),
    )
    _check_size(request, spec)
    _check_eta(request)
    sigmas_of(request, spec)
    return request


def sigmas_of(request: GenerationRequest, spec: ModelSpec) -> list[float]:
    """Return the noise levels that a resolved request visits.

    Raises:
        RequestError: The model's schedule has no such steps.
        BundleError: The model has no schedule.
    """
    assert request.num_inference_steps is not None, "the request is not resolved"
    try:
        table = training_sigmas(spec.alphas_cumprod)
    except ValueError as error:
        raise BundleError(f"{error}; export the bundle again") from error
    final = SAMPLERS[str(request.sampler)].final_sigma
    try:
        return sampling_sigmas(table, request.num_inference_steps, str(request.schedule), final)
    except ValueError as error:
        raise RequestError("num_inference_steps", str(error)) from error


def size_step(spec: ModelSpec) -> int:
    """Return what height and width are multiples of, in pixels.

    Latents must survive the UNet's halvings, or its skip connections no longer fit.
    """
    return int(spec.autoencoder.factor * 2 ** (len(spec.unet.channel_mult) - 1))


def _first(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise RequestError(name, f"must be text, got {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            name, f"is not valid Unicode at character {error.start}; was it typed in UTF-8?"
        ) from error
    return value


# NumPy's numbers are welcome and become Python's, so that records compare and encode.
def _whole_number(name: str, value: object, *, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise RequestError(name, f"must be a whole number, got {_shown(value)}")
    number = int(value)
    if not low <= number <= high:
        raise RequestError(name, f"must lie between {low} and {high}, got {_shown(number)}")
    return number


def _number(name: str, value: object, *, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RequestError(name, f"must be a number, got {_shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not low <= number <= high:  # which NaN never does
        raise RequestError(name, f"must lie between {low:g} and {high:g}, got {_shown(value)}")
    return number


def _name(name: str, value: object, *, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise RequestError(name, f"unknown {name} {_shown(value)}; choose {', '.join(choices)}")
    return value


def _check_size(request: GenerationRequest, spec: ModelSpec) -> None:
    step = size_step(spec)
    for name, size in (("height", request.height), ("width", request.width)):
        assert size is not None, "the request is not resolved"
        below = size // step * step
        if size != below:
            nearest = f"{below} and {below + step}" if below else f"{step} and {2 * step}"
            raise RequestError(
                name, f"{size} is not a multiple of {step}; the nearest sizes are {nearest}"
            )


def _check_eta(request: GenerationRequest) -> None:
    record = SAMPLERS[str(request.sampler)]
    if not record.uses_eta and request.eta != record.default_eta:
        users = ", ".join(name for name, each in SAMPLERS.items() if each.uses_eta)
        raise RequestError(
            "eta",
            f"sampler {request.sampler!r} has none, got {request.eta}; leave it out or choose "
            f"one of {users}",
        )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _switch(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise RequestError(name, f"must be true or false, got {_shown(value)}")
    return value


_REQUIRED = ("prompt", "negative_prompt", "num_images", "plain_prompt")
_CHECKS: Mapping[str, Callable[[str, object], object]] = MappingProxyType(
    {
        "prompt": _text,
        "negative_prompt": _text,
        "height": partial(_whole_number, low=1, high=MAX_SIDE),
        "width": partial(_whole_number, low=1, high=MAX_SIDE),
        "num_inference_steps": partial(_whole_number, low=1, high=MAX_STEPS),
        # Beyond 100, guidance leaves all that a network was ever fed, and float32 soon after.
        "guidance_scale": partial(_number, low=0.0, high=100.0),
        "sampler": partial(_name, choices=tuple(SAMPLERS)),
        "schedule": partial(_name, choices=tuple(SCHEDULES)),
        "eta": partial(_number, low=0.0, high=1.0),
        "seed": partial(_whole_number, low=0, high=MAX_SEED),
        "plain_prompt": _switch,
        "num_images": partial(_whole_number, low=1, high=MAX_IMAGES),
    }
)
