"""The generation request: one record for the Python call, the command line and PNG metadata."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypeVar, Unpack, get_args

from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.depth_maps import DepthMap
from ldm_runtime.inputs.embeddings import Embeddings
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.inputs.initial_latents import InitialLatents
from ldm_runtime.inputs.layouts import LayoutObject
from ldm_runtime.inputs.masks import MAX_BLUR
from ldm_runtime.inputs.reading import MAX_SIDE
from ldm_runtime.inputs.segmentation import SegmentationMap
from ldm_runtime.noise import NOISES
from ldm_runtime.requests.fields import (
    MAX_SEED,
    FieldRecord,
    about,
    about_items,
    check_names,
    checked_fields,
    field_records,
)
from ldm_runtime.requests.input_types import (
    DecoderName,
    NoiseName,
    PresetName,
    RequestFields,
    SamplerName,
    ScheduleName,
)
from ldm_runtime.requests.presets import PRESETS
from ldm_runtime.requests.sampler_names import with_known_names
from ldm_runtime.requests.signatures import list_fields
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import SCHEDULES

_Function = TypeVar("_Function", bound=Callable[..., Any])

MAX_STEPS = 100_000
MAX_IMAGES = 10_000
MAX_CLASS = 2**31 - 1
MAX_CLIP_SKIP = 100
#: In timesteps, whatever the task; `specs.tasks` has the highest of each.
MAX_NOISE_LEVEL = 999
MAX_SIGMA = 16383.0  # Brownian paths end at 2^14

#: Rules of feature reuse: see `reuse.reuse_of`.
REUSE = r"deep:[1-9][0-9]{0,5}|change:[0-9]{1,3}(\.[0-9]{1,9})?"

#: The schedule of a request whose noise levels are listed in `sigmas`.
CUSTOM = "custom"


@dataclass(frozen=True, kw_only=True, init=False, repr=False)
class GenerationRequest:
    """A request for images. Fields left at None take the bundle's default, or switch a feature off.

    It is made from a prompt and keywords, as in `GenerationRequest("…", seed=7)`, whose values may
    be all that `input_types.RequestFields` says; each is read and checked at once.

    Which fields a request must have, and which others mean something, depends on the bundle's task:
    `ldm_runtime.specs.tasks.TASKS` has them all. The text next to each field is also the help of
    its flag; `FIELDS` has the record of each. `sampler` and `schedule` may have the names of other
    programs, see `sampler_names`, and hold this program's afterwards.

    Sources: classifier-free guidance is Ho and Salimans 2022 (arXiv:2207.12598), guidance by an
    image Brooks et al. 2023 (arXiv:2211.09800), the rescaling of guidance Lin et al. 2023
    (arXiv:2305.08891) section 3.4, its interval Kynkäänniemi et al. 2024 (arXiv:2404.07724), and
    zero terminal SNR Lin et al. 2023 algorithm 1.

    Raises:
        RequestError: A field is unknown, has the wrong type or lies out of range.
    """

    prompt: Annotated[
        str | None,
        about(
            "what to generate, in words",
            "Conditioning",
            metavar="TEXT",
            flags=("-p",),
            example='a prompt, such as "a large red circle left of a small blue square on a white '
            'background"',
        ),
    ] = None
    class_label: Annotated[
        int | str | None,
        about(
            "a class, by its number or by its name (the bundle's, or that in --label-names)",
            "Conditioning",
            low=0,
            high=MAX_CLASS,
            metavar="LABEL",
            example="--class-label 3",
            or_name=True,
        ),
    ] = None
    layout: Annotated[
        tuple[LayoutObject, ...] | None,
        about(
            'JSON: [{"label": 3, "box": [left, top, right, bottom]}, ...], sides from 0 to 1',
            "Conditioning",
            metavar="FILE",
            example="--layout boxes.json",
        ),
    ] = None
    segmentation: Annotated[
        SegmentationMap | None,
        about(
            "PNG, gray or palette: a class number for each pixel",
            "Conditioning",
            metavar="FILE",
            example="--segmentation map.png",
        ),
    ] = None
    embeddings: Annotated[
        Embeddings | None,
        about(
            ".npy: one vector per row, of an encoder that the bundle does not hold",
            "Conditioning",
            metavar="FILE",
            example="--embeddings vectors.npy",
        ),
    ] = None
    depth_map: Annotated[
        DepthMap | None,
        about(
            "gray image or .npy: how near each pixel is, the nearest highest; default: estimated "
            "from --image",
            "Conditioning",
            metavar="FILE",
            example="--depth-map depth.png",
        ),
    ] = None
    negative_prompt: Annotated[
        str,
        about(
            "what to steer away from, with guidance",
            "Conditioning",
            metavar="TEXT",
            none_is_empty=True,
        ),
    ] = ""
    literal_prompt: Annotated[
        bool,
        about(
            "take prompts literally: no (word:1.2), [word], [a:b:0.5], BREAK or second chunk",
            "Conditioning",
        ),
    ] = False
    clip_skip: Annotated[
        int,
        about(
            "last layers of CLIP that prompts skip, as in diffusers; the web UI counts from 1; "
            "default: 0",
            "Conditioning",
            low=0,
            high=MAX_CLIP_SKIP,
            metavar="N",
        ),
    ] = 0
    original_size: Annotated[
        tuple[int, int] | None,
        about_items(
            "size that SDXL is told the image had before it was resized; default: the image's",
            "Conditioning",
            low=1,
            high=MAX_SIDE,
            metavar="WIDTHxHEIGHT",
            hint="give height and width in pixels",
        ),
    ] = None
    crop_top_left: Annotated[
        tuple[int, int] | None,
        about_items(
            "pixels that SDXL is told were cropped above the image and left of it; default: none",
            "Conditioning",
            low=0,
            high=MAX_SIDE,
            metavar="TOP,LEFT",
            hint="give top and left in pixels",
        ),
    ] = None
    target_size: Annotated[
        tuple[int, int] | None,
        about_items(
            "size that SDXL is told the image has; default: its own",
            "Conditioning",
            low=1,
            high=MAX_SIDE,
            metavar="WIDTHxHEIGHT",
            hint="give height and width in pixels",
        ),
    ] = None
    aesthetic_score: Annotated[
        float | None,
        about(
            "score that SDXL's refiner is told the image has, 0 to 10; default: 6",
            "Conditioning",
            low=0.0,
            high=10.0,
            metavar="SCORE",
        ),
    ] = None
    negative_aesthetic_score: Annotated[
        float | None,
        about(
            "score that it is told with the negative prompt; default: 2.5",
            "Conditioning",
            low=0.0,
            high=10.0,
            metavar="SCORE",
        ),
    ] = None
    height: Annotated[
        int | None,
        about(
            "height in pixels, a multiple of the bundle's size step; default: the bundle's",
            "Output",
            low=1,
            high=MAX_SIDE,
            metavar="PIXELS",
            flags=("-H",),
        ),
    ] = None
    width: Annotated[
        int | None,
        about(
            "width in pixels, likewise",
            "Output",
            low=1,
            high=MAX_SIDE,
            metavar="PIXELS",
            flags=("-W",),
        ),
    ] = None
    preset: Annotated[
        PresetName | None,
        about(
            "sampler, schedule, steps, eta and guidance of a distilled model, where not given",
            "Sampling",
            choices=tuple(PRESETS),
        ),
    ] = None
    num_inference_steps: Annotated[
        int | None,
        about(
            "steps of the sampler; default: the bundle's",
            "Sampling",
            low=1,
            high=MAX_STEPS,
            metavar="N",
            flags=("--steps",),
        ),
    ] = None
    # Beyond 100, guidance leaves all that a network was ever fed, and float32 soon after.
    guidance_scale: Annotated[
        float | None,
        about(
            "classifier-free guidance, 0 to 100; 1 is the unguided model, at half the work; "
            "default: the bundle's",
            "Guidance",
            low=0.0,
            high=100.0,
            metavar="W",
            flags=("--cfg-scale",),
        ),
    ] = None
    image_guidance_scale: Annotated[
        float | None,
        about(
            "guidance by the image to edit, 0 to 100: more keeps more of it, 1 is none; default: "
            "1.5",
            "Guidance",
            low=0.0,
            high=100.0,
            metavar="W",
        ),
    ] = None
    guidance_rescale: Annotated[
        float,
        about(
            "how far guided predictions get the contrast of unguided ones, 0 to 1; default: 0",
            "Guidance",
            low=0.0,
            high=1.0,
            metavar="PHI",
        ),
    ] = 0.0
    guidance_interval: Annotated[
        tuple[float, float] | None,
        about_items(
            "lowest and highest sigma with guidance; elsewhere a step costs half",
            "Guidance",
            low=0.0,
            high=MAX_SIGMA,
            metavar="LOW,HIGH",
        ),
    ] = None
    sampler: Annotated[
        SamplerName | None,
        about("the sampler; default: the bundle's", "Sampling", choices=tuple(SAMPLERS)),
    ] = None
    schedule: Annotated[
        ScheduleName | None,
        about(
            "the noise schedule; default: the sampler's",
            "Sampling",
            choices=(*SCHEDULES, CUSTOM),
        ),
    ] = None
    sigmas: Annotated[
        tuple[float, ...] | None,
        about_items(
            "decreasing noise levels, instead of a schedule and a number of steps",
            "Sampling",
            low=0.0,
            high=MAX_SIGMA,
            metavar="A,B,...",
        ),
    ] = None
    eta: Annotated[
        float | None,
        about(
            "share of fresh noise per step, 0 deterministic to 1 ancestral, for samplers "
            "that have it; default: the bundle's, of another sampler that sampler's",
            "Sampling",
            low=0.0,
            high=1.0,
        ),
    ] = None
    zero_terminal_snr: Annotated[
        bool, about("start from pure noise, for models that were trained so", "Sampling")
    ] = False
    seed: Annotated[
        int | None,
        about(
            "image i samples its noise from seed + i; default: a random one",
            "Sampling",
            low=0,
            high=MAX_SEED,
            flags=("-s",),
            hint="leave it out for a random one",
        ),
    ] = None
    noise: Annotated[
        NoiseName,
        about(
            "random number generator that the seed is for; default: torch-cpu",
            "Sampling",
            choices=tuple(NOISES),
        ),
    ] = "torch-cpu"
    variation_seed: Annotated[
        int | None,
        about(
            "go from --seed towards this one; image i goes towards it + i",
            "Sampling",
            low=0,
            high=MAX_SEED,
            metavar="SEED",
        ),
    ] = None
    variation_strength: Annotated[
        float,
        about(
            "how far, 0 (not at all) to 1; default: 0",
            "Sampling",
            low=0.0,
            high=1.0,
            metavar="S",
        ),
    ] = 0.0
    latents: Annotated[
        InitialLatents | None,
        about(
            ".npy: noise of unit variance (images, channels, height, width) to start from, or "
            "latents, with --denoising-start",
            "Sampling",
            metavar="FILE",
            example="--latents noise.npy",
        ),
    ] = None
    denoising_end: Annotated[
        float | None,
        about(
            "share of the noise schedule after which to stop, with noise left in the latents; "
            "default: 1",
            "Sampling",
            low=0.0,
            high=1.0,
            metavar="SHARE",
        ),
    ] = None
    denoising_start: Annotated[
        float | None,
        about(
            "share of the noise schedule that --latents have behind them, as a run with "
            "--denoising-end leaves them",
            "Sampling",
            low=0.0,
            high=1.0,
            metavar="SHARE",
        ),
    ] = None
    refiner_start: Annotated[
        float | None,
        about(
            "share of the noise schedule after which the refiner takes over; default: 0.8",
            "Sampling",
            low=0.0,
            high=1.0,
            metavar="SHARE",
        ),
    ] = None
    reuse: Annotated[
        str | None,
        about(
            "compute all of the UNet in one call of N alone (deep:N), or where its deep features "
            "changed by X (change:X), the outermost blocks in all others; default: never",
            "Sampling",
            pattern=REUSE,
            metavar="RULE",
            hint="give deep:3 for a whole call of the UNet in every 3, or change:0.1 for one where "
            "features changed by a tenth",
        ),
    ] = None
    num_images: Annotated[
        int,
        about(
            "how many images; default: 1",
            "Output",
            low=1,
            high=MAX_IMAGES,
            metavar="N",
            flags=("-n",),
        ),
    ] = 1
    image: Annotated[
        InputImage | None,
        about(
            "image to start from; to enlarge, inpaint, edit, vary or encode, if that is the task",
            "Input image",
            metavar="FILE",
            example="--image photo.png",
            flags=("-i",),
        ),
    ] = None
    noise_level: Annotated[
        int | None,
        about(
            "noise added to the image to enlarge, to hide its faults, or to the embedding of the "
            "image to vary: more invents more; default: 20 (at most 350) or 0 (at most 999)",
            "Input image",
            low=0,
            high=MAX_NOISE_LEVEL,
            metavar="N",
        ),
    ] = None
    strength: Annotated[
        float | None,
        about(
            "how much of it to change, above 0 to 1: the share of the steps that are made; "
            "default: 0.8, with a mask 1",
            "Input image",
            low=1e-6,
            high=1.0,
            metavar="S",
            hint="0 would change nothing",
        ),
    ] = None
    mask_image: Annotated[
        InputImage | None,
        about(
            "mask: pixels above one half are generated again, others are kept to the last bit",
            "Input image",
            metavar="FILE",
            example="--mask-image mask.png",
            flags=("--mask",),
        ),
    ] = None
    mask_blur: Annotated[
        tuple[int, int] | None,
        about_items(
            "blur of the mask in width and height, in pixels: the new image fades out beyond the "
            "edge of the mask, as in AUTOMATIC1111's web UI; default: none",
            "Input image",
            low=0,
            high=MAX_BLUR,
            metavar="X,Y",
            example="--mask-blur 4,4",
            hint="give those of width and height in pixels",
        ),
    ] = None
    outpaint: Annotated[
        tuple[int, int, int, int] | None,
        about_items(
            "pixels to add left of it, above, right and below, and to generate",
            "Input image",
            low=0,
            high=MAX_SIDE,
            metavar="L,T,R,B",
            example="--outpaint 0,0,64,0",
        ),
    ] = None
    hires_scale: Annotated[
        float | None,
        about(
            "enlarge the image this many times, 1 to 8, and sample over it again; default: "
            "no second pass",
            "Output",
            low=1.0,
            high=8.0,
            metavar="X",
        ),
    ] = None
    hires_strength: Annotated[
        float | None,
        about(
            "strength of that second pass, above 0 to 1; default: 0.6",
            "Output",
            low=1e-6,
            high=1.0,
            metavar="S",
        ),
    ] = None
    decoder: Annotated[
        DecoderName,
        about(
            "tiny decodes with the TAESD of ldm-export --tiny-decoder: fast, less exact; default: "
            "full",
            "Output",
            choices=get_args(DecoderName),
        ),
    ] = "full"
    tile_size: Annotated[
        int | None,
        about(
            "decode in tiles of this many pixels, which bounds memory; 0 is in one piece; default: "
            "0, above 128x128 latent pixels tiles of 96 latent pixels",
            "Output",
            low=0,
            high=MAX_SIDE,
            metavar="PIXELS",
        ),
    ] = None

    def __init__(self, prompt: str | None = None, **given: Unpack[RequestFields]) -> None:
        values = checked_fields(with_known_names({"prompt": prompt, **given}), FIELDS)
        for name, value in values.items():
            object.__setattr__(self, name, value)
        for name in ("seed", "variation_seed"):
            seed = getattr(self, name)
            if seed is not None and seed + self.num_images - 1 > MAX_SEED:
                raise RequestError(name, f"{seed} + num_images exceeds {MAX_SEED}; lower it")

    def __repr__(self) -> str:
        return f"GenerationRequest({changed_fields(self)})"

    @property
    def is_variation(self) -> bool:
        """Whether the noise leans towards that of another seed."""
        return self.variation_strength > 0


def changed_fields(request: GenerationRequest) -> str:
    """Return the fields of a request that are not at their defaults, as keywords."""
    values = ((each, getattr(request, each.name)) for each in fields(request))
    return ", ".join(f"{each.name}={value!r}" for each, value in values if value != each.default)


def parse_request(mapping: Mapping[str, object]) -> GenerationRequest:
    """Return the request that `mapping` (JSON, keywords) describes; nothing is converted.

    Raises:
        RequestError: A field is unknown, of the wrong type or out of range.
    """
    check_names(mapping, FIELDS)
    # The record checks every value itself, so that Python, the command line and JSON agree.
    return GenerationRequest(**mapping)  # type: ignore[arg-type]


#: The record of every field, by name.
FIELDS: Mapping[str, FieldRecord] = field_records(GenerationRequest)


def takes_fields(function: _Function) -> _Function:
    """Let the signature of a function that takes `**fields: Unpack[RequestFields]` list them."""
    return list_fields(function, FIELDS)


takes_fields(GenerationRequest.__init__)
