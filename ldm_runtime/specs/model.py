"""The specification of a model: its networks, its training schedule, and its defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self, TypeVar

from ldm_runtime.schedules import edm_timestep
from ldm_runtime.specs.components import COMPONENTS, Component, TensorSignature
from ldm_runtime.specs.networks import AutoencoderSpec, Networks, NetworkSpec, UNetSpec

PredictionType = Literal["epsilon", "v_prediction", "sample"]
NullPrompt = Literal["encoded", "zeros"]
#: The model's own decoder, or a tiny one that came with `ldm-export --tiny-decoder`.
Decoder = Literal["full", "tiny"]
Task = Literal[
    "unconditional",
    "class-to-image",
    "text-to-image",
    "layout-to-image",
    "semantic-synthesis",
    "super-resolution",
    "text-super-resolution",
    "inpainting",
    "text-inpainting",
    "image-editing",
    "image-variation",
    "depth-to-image",
    "retrieval",
    "autoencoder",
]

_Record = TypeVar("_Record", bound=NetworkSpec)


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """Defaults of fields that a request leaves open.

    Sizes are in pixels. Schedule and eta are of `sampler`: a request with another one has the
    defaults of that. A schedule of None is the sampler's own. Of EDM the schedule is of every
    sampler.
    """

    height: int
    width: int
    sampler: str
    schedule: str | None
    num_inference_steps: int
    guidance_scale: float
    eta: float


@dataclass(frozen=True, kw_only=True)
class NoiseAugmentation:
    """Noise on the embedding of an image, which a UNet was trained to see through.

    Noise is added to the normalised embedding. The UNet is told its level.

    Attributes:
        alphas_cumprod: Share of the embedding, squared, at each noise level.
        mean: Mean of each number of an embedding, …
        std: … and its standard deviation.
    """

    alphas_cumprod: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class EdmSpec:
    """Noise levels and scale of a model of EDM, which has no training timesteps.

    It was trained on a continuous range of noise levels, and its UNet is told the logarithm of one.
    `pipeline.denoiser` has what its output means.

    Source: Karras et al. 2022 (arXiv:2206.00364), table 1, "Ours".

    Attributes:
        sigma_min: Lowest noise level to sample at.
        sigma_max: Highest noise level, at which sampling starts.
        sigma_data: Standard deviation of clean latents in the UNet's scale.
    """

    sigma_min: float
    sigma_max: float
    sigma_data: float


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """One hyperparameter that the weights cannot tell, and where it was taken from.

    Attributes:
        field: Name of a field of `ModelSpec`, or of a network and one of its hyperparameters.
        value: Its value, as text.
        source: "flag", "preset NAME", "config", "file" (the checkpoint says it itself) or "family",
            followed by ", measured" if a measurement confirmed it; "measured" if that alone
            decided. Hints are "metadata", "config default" (of an entry that it leaves out) and
            "training step".
    """

    field: str
    value: str
    source: str


@dataclass(frozen=True, kw_only=True, repr=False)
class ModelSpec:
    """Specification of a model, from which everything downstream is derived.

    Attributes:
        family: Row of the family table that recognised it.
        task: The task of the model, which says how it takes a request.
        weights: Which of a checkpoint's two sets of UNet weights was used.
        networks: Hyperparameters of its networks by name; every model has an "autoencoder", and
            some have a "tiny_autoencoder" that decodes its latents, too.
        alphas_cumprod: Training noise schedule, one value per training timestep; empty
            without a UNet, and of EDM.
        edm: Noise levels of a model of EDM, or None with a schedule of training timesteps.
        prediction_type: Output that the UNet was trained for. Of EDM, "epsilon" is the output F of
            the paper's equation 7, and "v_prediction" its negative.
        null_prompt: Whether guidance steers away from the encoded empty prompt, or from zeros.
        noise_augmentation: Noise on the embedding of an image; None for a model without.
        scales_image: Whether the latents of an image to edit are concatenated in the UNet's scale,
            and not as the autoencoder has them.
        label_names: Names of the classes 0, 1, … of a class embedding, a layout encoder or a
            segmentation encoder; empty if they are not known.
        assumptions: Values that the weights could not tell.
    """

    family: str
    task: Task
    weights: Literal["ema", "model"]
    networks: Networks
    alphas_cumprod: tuple[float, ...]
    edm: EdmSpec | None
    prediction_type: PredictionType
    null_prompt: NullPrompt
    noise_augmentation: NoiseAugmentation | None
    scales_image: bool
    defaults: SamplingDefaults
    label_names: tuple[str, ...]
    assumptions: tuple[Assumption, ...]

    def __repr__(self) -> str:
        size = f"{self.defaults.width}x{self.defaults.height}"
        networks = ", ".join(self.networks)
        return f"ModelSpec({self.family}, {self.task}, {size}, {self.prediction_type}; {networks})"

    @property
    def unet(self) -> UNetSpec | None:
        """The denoising network, or None for an autoencoder alone."""
        return self.find(UNetSpec)

    @property
    def autoencoder(self) -> AutoencoderSpec:
        """The autoencoder that the UNet was trained with."""
        return self.network(AutoencoderSpec)  # the first by name

    @property
    def decoders(self) -> Mapping[Decoder, str]:
        """The component that each decoder of the model is."""
        tiny: Mapping[Decoder, str] = {"tiny": "tiny_decoder"}
        return {"full": "vae_decoder", **(tiny if "tiny_autoencoder" in self.networks else {})}

    @property
    def sigma_data(self) -> float:
        """Standard deviation of clean latents in the UNet's scale, as training takes it to be."""
        return sigma_data_of(self.edm)

    def find(self, record: type[_Record]) -> _Record | None:
        """Return the hyperparameters of the first network of a kind, or None without one."""
        return self.networks.find(record)

    def network(self, record: type[_Record]) -> _Record:
        """Return the hyperparameters of the first network of a kind.

        Raises:
            LookupError: The model has none; `find` is for models that may have none.
        """
        return self.networks.of(record)

    def with_networks(self, **networks: NetworkSpec | None) -> Self:
        """Return the specification with some networks replaced; None takes one away."""
        return replace(self, networks=self.networks.changed(**networks))


def components_of(spec: ModelSpec) -> Mapping[str, Component]:
    """Return the components of a model by name, with the inputs and outputs that it has.

    They come in the order in which a request uses them.
    """
    return {
        name: replace(
            row,
            inputs=_present(row.inputs, row, spec),
            outputs=_present(row.outputs, row, spec),
        )
        for name, row in COMPONENTS.items()
        if row.network in spec.networks
        and (not row.needs or getattr(spec.networks[row.network], row.needs) is not None)
    }


def axis_sizes(spec: ModelSpec, component: str) -> Mapping[str, int]:
    """Return the length of every axis of one of a model's components that is fixed."""
    row = COMPONENTS[component]
    network = spec.networks[row.network]
    lengths = {axis: getattr(network, attribute) for axis, attribute in row.lengths.items()}
    return {axis: length for axis, length in lengths.items() if length is not None}


def value_counts(spec: ModelSpec, component: str) -> Mapping[str, int]:
    """Return how many values each integer input of one of a model's components may take."""
    row = COMPONENTS[component]
    network = spec.networks[row.network]
    counts = {name: getattr(network, attribute) for name, attribute in row.counts.items()}
    return {name: count for name, count in counts.items() if count is not None}


def _present(
    tensors: tuple[TensorSignature, ...], row: Component, spec: ModelSpec
) -> tuple[TensorSignature, ...]:
    axes = row.lengths.keys() - axis_sizes(spec, row.name)
    names = row.counts.keys() - value_counts(spec, row.name)
    return tuple(
        tensor for tensor in tensors if axes.isdisjoint(tensor.axes) and tensor.name not in names
    )


def sigma_data_of(edm: EdmSpec | None) -> float:
    """Return the standard deviation of clean latents: 1 but for EDM, see `ModelSpec.sigma_data`."""
    return 1.0 if edm is None else edm.sigma_data


def timestep_range(spec: ModelSpec) -> tuple[float, float]:
    """Return the lowest and the highest timestep that a model's UNet is told."""
    if spec.edm is None:
        return 0.0, float(len(spec.alphas_cumprod) - 1)
    return edm_timestep(spec.edm.sigma_min), edm_timestep(spec.edm.sigma_max)


def latent_step(spec: ModelSpec) -> int:
    """Return the step of the sides of latents.

    They must survive the UNet's downsampling steps, or its skip connections no longer fit.
    """
    return latent_step_of(spec.unet)


def latent_step_of(unet: UNetSpec | None) -> int:
    """Return the step of the sides of latents, see `latent_step`."""
    return 1 if unet is None else int(2 ** (len(unet.channel_mult) - 1))


def size_step(spec: ModelSpec) -> int:
    """Return the step of height and width in pixels, except for enlarged images."""
    return spec.autoencoder.factor * latent_step(spec)
