"""The one record behind the Python call, the command line and the metadata of a PNG."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from types import MappingProxyType
from typing import Any

from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.embeddings import Embeddings
from ldm_runtime.inputs.images import MAX_SIDE, Picture
from ldm_runtime.inputs.layouts import LayoutObject
from ldm_runtime.inputs.segmentation import ClassMap
from ldm_runtime.noise import NOISES
from ldm_runtime.requests import fields as checks
from ldm_runtime.requests.fields import MAX_SEED
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import SCHEDULES

MAX_STEPS = 100_000
MAX_IMAGES = 10_000
MAX_CLASS = 2**31 - 1
MAX_SIGMA = 16383.0  # Brownian paths end at 2^14

#: The schedule of a request whose noise levels are listed in `sigmas`.
GIVEN = "given"


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What to draw. Fields left at None take the bundle's default, or switch their feature off.

    Which fields say what to draw, and which are welcome besides, depends on the bundle's task:
    `ldm_runtime.specs.tasks.TASKS` has them all.

    Attributes:
        prompt: What to draw, in words.
        class_label: What to draw, as the number of a class.
        layout: What to draw where: labelled boxes.
        segmentation: What to draw where: a class for every pixel.
        embeddings: What to draw, as vectors of an encoder that the bundle does not hold.
        negative_prompt: What to steer away from; used where guidance is on.
        plain_prompt: Take prompts literally: no weights `(word:1.2)`, no `BREAK`, cut where the
            text encoder ends.
        height: Pixels; a multiple of the size step of the bundle.
        width: Pixels, likewise.
        num_inference_steps: Steps of the sampler, at least 1.
        guidance_scale: Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598);
            1 is the plain conditional model, at half the work.
        guidance_rescale: How far guided predictions get the contrast of unguided ones, 0 to 1
            (Lin et al. 2023, arXiv:2305.08891, section 3.4).
        guidance_interval: Lowest and highest sigma at which guidance is on (Kynkäänniemi et al.
            2024, arXiv:2404.07724); None is everywhere.
        sampler: Name in `ldm_runtime.samplers.SAMPLERS`.
        schedule: Name in `ldm_runtime.schedules.SCHEDULES`; None is the sampler's own.
        sigmas: Noise levels to visit, decreasing, instead of a schedule and a number of steps.
        eta: Share of fresh noise a step, 0 deterministic to 1 ancestral, for samplers that have it.
        zero_terminal_snr: Sample from pure noise, for models that were trained so (Lin et al. 2023,
            algorithm 1).
        seed: Image i draws its noise from seed + i. None draws a seed and records it.
        noise: Name in `ldm_runtime.noise.NOISES`: whose random numbers a seed means.
        variation_seed: Seed of the noise to go towards. With a variation every image starts from
            `seed`, and image i goes towards variation_seed + i.
        variation_strength: How far, 0 (not at all) to 1.
        num_images: How many pictures.
        image: Picture to start from; to enlarge, fill or encode, if that is the bundle's task.
        strength: How much of it to forget, above 0 to 1; the share of the steps that are made.
        mask_image: What of `image` to draw anew: white yes, black no. Black pixels are kept as
            they are, to the last bit.
        outpaint: Pixels to add to `image` left, above, right and below it, and to draw.
        hires_scale: Draw, enlarge the picture this many times, and draw over it once more.
        hires_strength: `strength` of that second pass.
        tile_size: Decode in tiles of this many pixels, which bounds memory; 0 is in one piece.

    Raises:
        RequestError: A field has the wrong type or lies out of range.
    """

    prompt: str | None = None
    class_label: int | None = None
    layout: tuple[LayoutObject, ...] | None = None
    segmentation: ClassMap | None = None
    embeddings: Embeddings | None = None
    negative_prompt: str = ""
    plain_prompt: bool = False
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    sampler: str | None = None
    schedule: str | None = None
    sigmas: tuple[float, ...] | None = None
    eta: float | None = None
    zero_terminal_snr: bool = False
    seed: int | None = None
    noise: str = "torch-cpu"
    variation_seed: int | None = None
    variation_strength: float = 0.0
    num_images: int = 1
    image: Picture | None = None
    strength: float | None = None
    mask_image: Picture | None = None
    outpaint: tuple[int, int, int, int] | None = None
    hires_scale: float | None = None
    hires_strength: float | None = None
    tile_size: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                object.__setattr__(self, field.name, _CHECKS[field.name](field.name, value))
        for name in ("seed", "variation_seed"):
            seed = getattr(self, name)
            if seed is not None and seed + self.num_images - 1 > MAX_SEED:
                raise RequestError(name, f"{seed} + num_images exceeds {MAX_SEED}; lower it")

    @property
    def is_variation(self) -> bool:
        """Whether the noise leans towards that of another seed."""
        return self.variation_strength > 0


def parse_request(mapping: Mapping[str, object]) -> GenerationRequest:
    """Return the request that `mapping` (JSON, keywords) describes; nothing is converted.

    Raises:
        RequestError: A field is unknown, of the wrong type or out of range.
    """
    names = [field.name for field in fields(GenerationRequest)]
    for name in mapping:
        if name not in names:
            raise RequestError(str(name), f"unknown field; a request has {', '.join(names)}")
    # The record checks every value itself, so that Python, the command line and JSON agree.
    return GenerationRequest(**mapping)  # type: ignore[arg-type]


def request_to_json(request: GenerationRequest) -> dict[str, Any]:
    """Return what `parse_request` reads, as JSON values.

    Of pictures, class maps and embeddings it has what identifies them.
    """
    values = {field.name: getattr(request, field.name) for field in fields(request)}
    return {name: _description(value) for name, value in values.items()}


def _description(value: object) -> object:
    match value:
        case Picture() | ClassMap():
            width, height = value.size
            return {"sha256": value.sha256, "width": width, "height": height}
        case Embeddings():
            count, width = value.values.shape
            return {"sha256": value.sha256, "count": count, "width": width}
        case LayoutObject():
            return {"label": value.label, "box": list(value.box)}
        case tuple():
            return [_description(each) for each in value]
    return value


_pixels = partial(checks.whole_number, low=1, high=MAX_SIDE)
_seed = partial(checks.whole_number, low=0, high=MAX_SEED)
_share = partial(checks.number, low=0.0, high=1.0)

_CHECKS: Mapping[str, Callable[[str, object], object]] = MappingProxyType(
    {
        "prompt": checks.text,
        "class_label": partial(checks.whole_number, low=0, high=MAX_CLASS),
        "layout": checks.layout,
        "segmentation": checks.class_map,
        "embeddings": checks.embeddings,
        "negative_prompt": checks.text,
        "plain_prompt": checks.switch,
        "height": _pixels,
        "width": _pixels,
        "num_inference_steps": partial(checks.whole_number, low=1, high=MAX_STEPS),
        # Beyond 100, guidance leaves all that a network was ever fed, and float32 soon after.
        "guidance_scale": partial(checks.number, low=0.0, high=100.0),
        "guidance_rescale": _share,
        "guidance_interval": partial(checks.interval, low=0.0, high=MAX_SIGMA),
        "sampler": partial(checks.choice, choices=tuple(SAMPLERS)),
        "schedule": partial(checks.choice, choices=(*SCHEDULES, GIVEN)),
        "sigmas": partial(checks.numbers_list, low=0.0, high=MAX_SIGMA),
        "eta": _share,
        "zero_terminal_snr": checks.switch,
        "seed": _seed,
        "noise": partial(checks.choice, choices=tuple(NOISES)),
        "variation_seed": _seed,
        "variation_strength": _share,
        "num_images": partial(checks.whole_number, low=1, high=MAX_IMAGES),
        "image": checks.picture,
        "strength": partial(checks.number, low=1e-6, high=1.0),
        "mask_image": checks.picture,
        "outpaint": partial(checks.margins, high=MAX_SIDE),
        "hires_scale": partial(checks.number, low=1.0, high=8.0),
        "hires_strength": partial(checks.number, low=1e-6, high=1.0),
        "tile_size": partial(checks.whole_number, low=0, high=MAX_SIDE),
    }
)
