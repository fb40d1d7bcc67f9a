"""The checks that the components of a model fit each other, task by task."""

from ldm_export.errors import ExportError, WeightsError
from ldm_runtime.specs.micro_conditioning import pooled_length, vector_lengths
from ldm_runtime.specs.model import ModelSpec, axis_sizes, components_of, size_step
from ldm_runtime.specs.networks import ImageEncoderSpec, SegmentationEncoderSpec, UNetSpec
from ldm_runtime.specs.plausible import implausible_fields

_NOT_ONE_MODEL = "they do not belong to one model"


def check_consistent(spec: ModelSpec) -> None:
    """Check widths and channels where components meet, and that the default size can be generated.

    Raises:
        WeightsError: Two components cannot belong to one model, or a value is one of no model, so
            that the bundle could not be opened.
        ExportError: The default size is not a multiple of the model's size step.
    """
    for field in implausible_fields(spec):
        raise WeightsError(
            f"the model's {field} cannot be what it is; are weights, flags and configuration of "
            "one model?"
        )
    if spec.unet is not None:
        _check_latents(spec, spec.unet)
        _check_context(spec, spec.unet)
        _check_vector(spec, spec.unet)
        _check_concat(spec, spec.unet)
    _check_size(spec)


def _check_latents(spec: ModelSpec, unet: UNetSpec) -> None:
    if spec.autoencoder.embed_dim != unet.out_channels:
        raise WeightsError(
            f"the autoencoder has {spec.autoencoder.embed_dim} latent channels, but the UNet "
            f"predicts {unet.out_channels}; {_NOT_ONE_MODEL}"
        )


def _check_context(spec: ModelSpec, unet: UNetSpec) -> None:
    widths = {
        name: axis_sizes(spec, name)["context_dim"]
        for name, component in components_of(spec).items()
        if component.role == "conditioner" and "context_dim" in axis_sizes(spec, name)
    }
    if widths and sum(widths.values()) != unet.context_dim:
        names = " and the ".join(name.replace("_", " ") for name in widths)
        found = " and ".join(map(str, widths.values()))
        verb = "is" if len(widths) == 1 else "are"
        raise WeightsError(
            f"the {names} {verb} {found} wide, but the UNet attends to a context "
            f"of width {unet.context_dim}; {_NOT_ONE_MODEL}"
        )


def _check_vector(spec: ModelSpec, unet: UNetSpec) -> None:
    """Check that the UNet takes a vector as long as its conditions make it."""
    encoder = spec.find(ImageEncoderSpec)
    if encoder is not None:
        expected = 2 * encoder.embed_dim
        if unet.vector_dim != expected:
            raise WeightsError(
                f"the UNet takes a vector of {unet.vector_dim or 0} numbers "
                f"(label_emb.0.0.weight), but the embedding of an image and its noise level are "
                f"{expected}; {_NOT_ONE_MODEL}"
            )
        return
    known = vector_lengths(spec).values()
    if unet.vector_dim is not None and unet.vector_dim not in known:
        raise WeightsError(
            f"the UNet takes a vector of {unet.vector_dim} numbers (label_emb.0.0.weight), but a "
            f"pooled prompt of {pooled_length(spec)} and the sizes of an image are "
            f"{' or '.join(map(str, known))}; {_NOT_ONE_MODEL}"
        )


def _check_concat(spec: ModelSpec, unet: UNetSpec) -> None:
    """Check that the UNet takes as many channels as its task concatenates to the latents."""
    autoencoder = spec.autoencoder
    expected, what = 0, "nothing"
    segmentation_encoder = spec.find(SegmentationEncoderSpec)
    if segmentation_encoder is not None:
        expected, what = segmentation_encoder.out_channels, "a segmentation map"
    elif spec.task in ("inpainting", "text-inpainting"):
        expected, what = autoencoder.embed_dim + 1, "latents of the masked image and the mask"
    elif spec.task == "image-editing":
        expected, what = autoencoder.embed_dim, "latents of the image to edit"
    elif spec.task == "depth-to-image":
        expected, what = 1, "depth"
    elif spec.task in ("super-resolution", "text-super-resolution"):
        expected, what = autoencoder.image_channels, "the low-resolution image"
    if unet.concat_channels != expected:
        raise WeightsError(
            f"the UNet takes {unet.in_channels} channels and predicts {unet.out_channels}, but "
            f"what is concatenated to the latents ({what}) has {expected}; {_NOT_ONE_MODEL}"
        )


def _check_size(spec: ModelSpec) -> None:
    multiple = size_step(spec)
    for name, size in (("height", spec.defaults.height), ("width", spec.defaults.width)):
        if size % multiple:
            raise ExportError(
                f"the default {name} is {size}, but this model generates multiples of {multiple} "
                f"pixels; give --{name} {max(1, round(size / multiple)) * multiple}"
            )
