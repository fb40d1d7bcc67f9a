"""`ResolvedRequest`: a request with nothing left open, which the pipeline runs.

No field is ever None: an optional part of a request is one of several records. A resolved
request is a pure function of a request and a model, and with its seed it decides every bit of the
images, so it is what travels: to the metadata of a PNG, into a batch, to another process.
"""

from dataclasses import dataclass, replace
from typing import TypeVar

from ldm_runtime.inputs.depth_maps import DepthMap
from ldm_runtime.inputs.embeddings import Embeddings
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.inputs.initial_latents import InitialLatents
from ldm_runtime.inputs.layouts import LayoutObject
from ldm_runtime.inputs.segmentation import SegmentationMap
from ldm_runtime.requests.guidance import GuidanceChain, guidance_chain
from ldm_runtime.requests.micro_conditioning import MicroConditioning
from ldm_runtime.requests.request import CUSTOM, MAX_SIGMA, GenerationRequest, changed_fields
from ldm_runtime.specs.model import Decoder, Task
from ldm_runtime.specs.tasks import TASKS

#: The guidance interval that has every sigma in it.
EVERY_SIGMA = (0.0, MAX_SIGMA)


@dataclass(frozen=True, kw_only=True)
class NoCondition:
    """No condition: the request has nothing but noise, or an image alone."""


@dataclass(frozen=True, kw_only=True)
class PromptCondition:
    """A prompt, and how it is read.

    Attributes:
        prompt: The prompt.
        negative_prompt: What guidance steers away from.
        literal: Whether they have no weights, no `BREAK` and one chunk.
        clip_skip: How many of the text encoder's layers at the end they skip.
    """

    prompt: str
    negative_prompt: str
    literal: bool
    clip_skip: int


@dataclass(frozen=True, kw_only=True)
class ClassCondition:
    """The number of a class."""

    label: int


@dataclass(frozen=True, kw_only=True)
class LayoutCondition:
    """Labelled boxes."""

    objects: tuple[LayoutObject, ...]


@dataclass(frozen=True, kw_only=True)
class SegmentationCondition:
    """A class for every pixel."""

    segmentation: SegmentationMap


@dataclass(frozen=True, kw_only=True)
class EmbeddingsCondition:
    """Embeddings of an encoder that the bundle does not hold."""

    embeddings: Embeddings


Condition = (
    NoCondition
    | PromptCondition
    | ClassCondition
    | LayoutCondition
    | SegmentationCondition
    | EmbeddingsCondition
)


#: Blur of a mask that stays as it is.
NO_BLUR = (0, 0)


@dataclass(frozen=True, kw_only=True)
class NoImage:
    """No image: sampling starts from noise."""


@dataclass(frozen=True, kw_only=True)
class WholeImage:
    """An image, all of which may change; or one to enlarge or to encode."""

    image: InputImage

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.image.size


@dataclass(frozen=True, kw_only=True)
class MaskedImage:
    """An image, and the mask of what is generated again: pixels above one half are.

    Attributes:
        image: The image.
        mask: The mask.
        blur: Standard deviation of the blur of the mask in width and height, in pixels.
    """

    image: InputImage
    mask: InputImage
    blur: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.image.size


@dataclass(frozen=True, kw_only=True)
class OutpaintedImage:
    """An image, and pixels to add left of it, above, right and below."""

    image: InputImage
    margins: tuple[int, int, int, int]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, with what is added."""
        (width, height), (left, top, right, bottom) = self.image.size, self.margins
        return left + width + right, top + height + bottom


RequestImage = NoImage | WholeImage | MaskedImage | OutpaintedImage


@dataclass(frozen=True, kw_only=True)
class NoDepth:
    """No depth: the model is of another task."""


@dataclass(frozen=True, kw_only=True)
class EstimatedDepth:
    """The depth that the model's depth estimator sees in the image of the request."""


@dataclass(frozen=True, kw_only=True)
class GivenDepth:
    """A depth map that the request brings."""

    depth_map: DepthMap


Depth = NoDepth | EstimatedDepth | GivenDepth


@dataclass(frozen=True, kw_only=True)
class SeededNoise:
    """First noise from the seed of each image."""

    def of_image(self, index: int) -> "SeededNoise":
        """Return that of one image."""
        return self


@dataclass(frozen=True, kw_only=True)
class GivenNoise:
    """First noise that the request brings, (num_images, C, h, w); later noise is the seed's."""

    latents: InitialLatents

    def of_image(self, index: int) -> "GivenNoise":
        """Return that of one image."""
        return GivenNoise(latents=self.latents.of_image(index))


@dataclass(frozen=True, kw_only=True)
class PartlyDenoised:
    """Latents of an earlier run to go on from, in place of noise; later noise is the seed's.

    Attributes:
        latents: (num_images, C, h, w) in the UNet's scale, as `Result.latents` are.
        denoising_start: Share of the noise schedule that is behind them.
    """

    latents: InitialLatents
    denoising_start: float

    def of_image(self, index: int) -> "PartlyDenoised":
        """Return that of one image."""
        return replace(self, latents=self.latents.of_image(index))


FirstNoise = SeededNoise | GivenNoise | PartlyDenoised


@dataclass(frozen=True, kw_only=True)
class NoRefiner:
    """No refiner: one model makes all steps."""


@dataclass(frozen=True, kw_only=True)
class Refiner:
    """A second model makes the last steps: those that begin after a share of the noise schedule."""

    start: float


@dataclass(frozen=True, kw_only=True)
class NoReuse:
    """No feature reuse: every call computes the whole UNet."""


@dataclass(frozen=True, kw_only=True)
class ReuseByInterval:
    """One call of `interval` computes the whole UNet, the others its outermost blocks."""

    interval: int

    @property
    def rule(self) -> str:
        """The rule as a request states it."""
        return f"deep:{self.interval}"


@dataclass(frozen=True, kw_only=True)
class ReuseByChange:
    """The whole UNet is computed where its deep features would have changed by `threshold`."""

    threshold: float

    @property
    def rule(self) -> str:
        """The rule as a request states it."""
        return f"change:{self.threshold:.9f}".rstrip("0").rstrip(".")


Reuse = NoReuse | ReuseByInterval | ReuseByChange


@dataclass(frozen=True, kw_only=True)
class SamplingPass:
    """One run of the sampler over the same noise levels.

    Attributes:
        height: Of its images, in pixels.
        width: Likewise.
        strength: Share of its image that it forgets, above 0 to 1.
        steps: Indices of the steps that it makes, of all that the noise levels are for.
        first_step: Number of the first of them for prompts, see `scheduled_prompts`.
        scale: How many times the images of the pass before it are enlarged to start from; 1 for the
            first pass.
        micro_conditioning: What the UNet is told about its images, if it takes that.
    """

    height: int
    width: int
    strength: float
    steps: range
    first_step: int
    scale: float
    micro_conditioning: MicroConditioning


_Condition = TypeVar("_Condition", bound=Condition)


@dataclass(frozen=True, kw_only=True, repr=False)
class ResolvedRequest:
    """A request to one model, down to the last number; see `resolution.resolve`.

    Attributes:
        task: The model's task, which gives the fields of a request their meaning.
        condition: The condition of the UNet.
        depth: The depth that the result follows, if that is the task.
        source_image: The image that the request brings, to start from, to enlarge or to encode.
        noise_level: Noise added to the image to enlarge, or to the embedding of the image to vary,
            in timesteps; 0 in other tasks.
        height: Of the images, in pixels; those of the first pass, if there is a second.
        width: Likewise.
        num_images: How many images.
        num_inference_steps: Steps that the schedule is asked for, or that `sigmas` lists.
        sampler: Name in `ldm_runtime.samplers.SAMPLERS`; empty for a model that only encodes and
            decodes, like all fields that say how to sample.
        schedule: Name in `ldm_runtime.schedules.SCHEDULES`, or "custom" for listed sigmas.
        sigmas: Noise levels from first to last, decreasing; one more than there are steps.
        eta: Share of fresh noise per step.
        zero_terminal_snr: Whether the training schedule is rescaled to end in pure noise.
        guidance_scale: Guidance; 1 is the unguided model.
        embeds_guidance: Whether the UNet takes the guidance scale as an input, so that guidance
            asks no further sample of it.
        image_guidance_scale: Guidance by the image to edit; 1 is none, as in every other task.
        guidance_rescale: How far guided predictions get the contrast of unguided ones, 0 to 1.
        guidance_interval: Lowest and highest sigma with guidance.
        seed: Image i samples its noise from seed + i.
        noise: Name in `ldm_runtime.noise.NOISES`.
        variation_seed: Seed of the noise to go towards.
        variation_strength: How far, 0 (not at all) to 1.
        first_noise: The noise that the first pass starts from, or latents in its place.
        denoising_end: Share of the noise schedule after which the first pass stops.
        refiner: Where a second model takes over, if there is one.
        reuse: Which calls compute the whole UNet, and not its outermost blocks alone.
        passes: Runs of the sampler, one after the other; none without sampling.
        decoder: The model's own decoder, or its tiny one.
        tile_size: Decode in tiles of that many pixels; 0 decodes in one piece.
    """

    task: Task
    condition: Condition
    depth: Depth
    source_image: RequestImage
    noise_level: int
    height: int
    width: int
    num_images: int
    num_inference_steps: int
    sampler: str
    schedule: str
    sigmas: tuple[float, ...]
    eta: float
    zero_terminal_snr: bool
    guidance_scale: float
    embeds_guidance: bool
    image_guidance_scale: float
    guidance_rescale: float
    guidance_interval: tuple[float, float]
    seed: int
    noise: str
    variation_seed: int
    variation_strength: float
    first_noise: FirstNoise
    denoising_end: float
    refiner: NoRefiner | Refiner
    reuse: Reuse
    passes: tuple[SamplingPass, ...]
    decoder: Decoder
    tile_size: int

    def __repr__(self) -> str:
        return f"ResolvedRequest({self.task}: {changed_fields(self.as_request())})"

    @property
    def num_steps(self) -> int:
        """Steps from noise on: with the schedule `ldm` there may be more than asked for."""
        return max(0, len(self.sigmas) - 1)

    @property
    def is_guided(self) -> bool:
        """Whether the UNet also sees what the result is steered away from."""
        return bool(self.guidance.scales)

    @property
    def guidance(self) -> GuidanceChain:
        """The samples that an image asks of the UNet, and the scales between them."""
        return guidance_chain(self.classifier_free_scale, self.image_guidance_scale)

    @property
    def classifier_free_scale(self) -> float:
        """The guidance scale between samples: 1, none, where the UNet takes it as an input."""
        return 1.0 if self.embeds_guidance else self.guidance_scale

    @property
    def is_variation(self) -> bool:
        """Whether the noise leans towards that of another seed."""
        return self.variation_strength > 0

    def condition_as(self, kind: type[_Condition]) -> _Condition:
        """Return the condition, which is of a kind that the caller knows from the task.

        Raises:
            TypeError: It is of another kind.
        """
        if not isinstance(self.condition, kind):
            raise TypeError(f"a {self.task} request has {self.condition}, not a {kind.__name__}")
        return self.condition

    def of_image(self, index: int) -> "ResolvedRequest":
        """Return the request that generates image `index` alone."""
        alone = replace(self, num_images=1, first_noise=self.first_noise.of_image(index))
        if self.is_variation:
            return replace(alone, variation_seed=self.variation_seed + index)
        seed = self.seed + index
        return replace(alone, seed=seed, variation_seed=seed)

    def as_request(self) -> GenerationRequest:
        """Return the request that resolves to this one, every field filled in that means something.

        It is what a PNG's metadata holds, as `request.request_to_json` writes it.
        """
        known = {**_condition_fields(self.condition), **_image_fields(self.source_image)}
        known |= {"height": self.height, "width": self.width, "seed": self.seed}
        if isinstance(self.depth, GivenDepth):
            known["depth_map"] = self.depth.depth_map
        if self.passes:
            known |= _sampling_fields(self)
        if "noise_level" in TASKS[self.task].takes:
            known["noise_level"] = self.noise_level
        if "decoder" in TASKS[self.task].takes:
            known["decoder"] = self.decoder
        if "tile_size" in TASKS[self.task].takes:
            known["tile_size"] = self.tile_size
        return GenerationRequest(**known)  # type: ignore[arg-type]


def _condition_fields(condition: Condition) -> dict[str, object]:
    match condition:
        case PromptCondition():
            return {
                "prompt": condition.prompt,
                "negative_prompt": condition.negative_prompt,
                "literal_prompt": condition.literal,
                "clip_skip": condition.clip_skip,
            }
        case ClassCondition():
            return {"class_label": condition.label}
        case LayoutCondition():
            return {"layout": condition.objects}
        case SegmentationCondition():
            return {"segmentation": condition.segmentation}
        case EmbeddingsCondition():
            return {"embeddings": condition.embeddings}
    return {}


def _image_fields(image: RequestImage) -> dict[str, object]:
    match image:
        case WholeImage():
            return {"image": image.image}
        case MaskedImage():
            blur = {} if image.blur == NO_BLUR else {"mask_blur": image.blur}
            return {"image": image.image, "mask_image": image.mask, **blur}
        case OutpaintedImage():
            return {"image": image.image, "outpaint": image.margins}
    return {}


def _sampling_fields(request: ResolvedRequest) -> dict[str, object]:
    first, *more = request.passes
    known: dict[str, object] = {
        "num_images": request.num_images,
        "num_inference_steps": request.num_inference_steps,
        "sampler": request.sampler,
        "schedule": request.schedule,
        "eta": request.eta,
        "zero_terminal_snr": request.zero_terminal_snr,
        "guidance_scale": request.guidance_scale,
        "guidance_rescale": request.guidance_rescale,
        "noise": request.noise,
    }
    if request.schedule == CUSTOM:
        known["sigmas"] = request.sigmas
    if request.guidance_interval != EVERY_SIGMA:
        known["guidance_interval"] = request.guidance_interval
    if request.is_variation:
        known["variation_seed"] = request.variation_seed
        known["variation_strength"] = request.variation_strength
    if TASKS[request.task].guides_by_image:
        known["image_guidance_scale"] = request.image_guidance_scale
    known |= _latents_fields(request.first_noise) | _end_fields(request)
    if not isinstance(request.source_image, NoImage) and TASKS[request.task].image == "start":
        known["strength"] = first.strength
    for each in request.passes:
        known |= each.micro_conditioning.changed_fields((each.height, each.width))
    for second in more:
        known |= {"hires_scale": second.scale, "hires_strength": second.strength}
    return known


def _latents_fields(first_noise: FirstNoise) -> dict[str, object]:
    match first_noise:
        case GivenNoise():
            return {"latents": first_noise.latents}
        case PartlyDenoised():
            return {
                "latents": first_noise.latents,
                "denoising_start": first_noise.denoising_start,
            }
    return {}


def _end_fields(request: ResolvedRequest) -> dict[str, object]:
    known: dict[str, object] = {}
    if request.denoising_end != 1:
        known["denoising_end"] = request.denoising_end
    if isinstance(request.refiner, Refiner):
        known["refiner_start"] = request.refiner.start
    if not isinstance(request.reuse, NoReuse):
        known["reuse"] = request.reuse.rule
    return known
