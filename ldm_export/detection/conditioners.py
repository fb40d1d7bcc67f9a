"""The hyperparameters of conditioners: encoders of text, images, classes, maps and depth."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

from ldm_export.checkpoint.file_fields import FileFields
from ldm_export.detection.compvis_config import ConfigFields
from ldm_export.detection.overrides import Sources, assumed, first_stated
from ldm_export.errors import ExportError, WeightsError
from ldm_export.families.records import FamilyDefaults
from ldm_export.hyperparameters.conditioners import read_channel_mapper, read_class_embedding
from ldm_export.hyperparameters.depth_estimator import read_depth_estimator
from ldm_export.hyperparameters.image_encoder import read_image_encoder
from ldm_export.hyperparameters.shapes import Shapes
from ldm_export.hyperparameters.text_encoders import (
    OPENCLIP_LAYERS,
    ClipShapes,
    read_bert,
    read_clip,
    read_openclip,
)
from ldm_runtime.specs.model import Assumption
from ldm_runtime.specs.networks import (
    AutoencoderSpec,
    ClassEmbedderSpec,
    DepthEstimatorSpec,
    ImageEncoderSpec,
    NetworkSpec,
    SegmentationEncoderSpec,
    TextEncoderSpec,
)

_LOGGER = logging.getLogger(__name__)

_CLIP_HEAD_CHANNELS = 64
_WORDPIECE_PADDING = 0
#: open_clip fills prompts up with zeros, and its encoders here have the exact GELU
#: (`model_configs/ViT-H-14.json` and `ViT-bigG-14.json` of mlfoundations/open_clip, 89fb801).
_OPENCLIP_PADDING = 0
#: Mean and standard deviation of red, green and blue in the training images of OpenAI's CLIP, which
#: OpenCLIP took over (`clip.py` of openai/CLIP, `constants.py` of open_clip).
_PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
_PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def text_encoder_record(
    sources: Sources, shapes: Shapes, _autoencoder: AutoencoderSpec
) -> tuple[TextEncoderSpec, list[Assumption]]:
    """Return the record of a text or layout encoder, and its assumptions.

    Raises:
        WeightsError: Tensors are missing or contradict each other.
        ExportError: The configuration has an impossible number of heads.
    """
    if "transformer.resblocks.0.ln_1.weight" in shapes:
        return _openclip(sources, shapes, is_first=True)
    if "transformer.token_emb.weight" not in shapes:
        return _clip(sources, shapes)
    # Layouts are filled up with the last token, prompts with the first word piece.
    is_text = sources.family.task == "text-to-image"
    bert = read_bert(shapes, pad_token_id=_WORDPIECE_PADDING if is_text else None)
    return bert, [assumed("text_encoder.pad_token_id", bert.pad_token_id, "family")]


def second_text_encoder_record(
    sources: Sources, shapes: Shapes, _autoencoder: AutoencoderSpec
) -> tuple[TextEncoderSpec, list[Assumption]]:
    """Return the record of a second text encoder, which is OpenCLIP's, and its assumptions.

    Raises:
        WeightsError: Tensors are missing or contradict each other.
    """
    spec, notes = _openclip(sources, shapes, is_first=False)
    return spec, [
        replace(each, field=each.field.replace("text_encoder", "text_encoder_2")) for each in notes
    ]


def image_encoder_record(
    sources: Sources, shapes: Shapes, _autoencoder: AutoencoderSpec
) -> tuple[ImageEncoderSpec, list[Assumption]]:
    """Return the record of CLIP's image encoder, and its assumptions.

    Raises:
        WeightsError: Tensors are missing or contradict each other, or what the files say of images.
    """
    vision, family, file = read_image_encoder(shapes), sources.family, sources.file
    if file.image_size not in (None, vision.image_size):
        raise WeightsError(
            f"the feature extractor makes images of {file.image_size} pixels per side, but the "
            f"image encoder takes {vision.image_size}; they do not belong to one model"
        )
    num_heads, of_heads = first_stated(
        "image_encoder.num_heads",
        None,
        None,
        max(1, vision.width // family.image_head_channels),
        file=file.image_num_heads,
    )
    activation, of_activation = first_stated(
        "image_encoder.activation", None, None, family.image_activation, file=file.image_activation
    )
    spec = ImageEncoderSpec(
        width=vision.width,
        num_layers=vision.num_layers,
        num_heads=num_heads,
        feed_forward_dim=vision.feed_forward_dim,
        activation=activation,
        patch_size=vision.patch_size,
        image_size=vision.image_size,
        embed_dim=vision.embed_dim,
        pixel_mean=file.pixel_mean or _PIXEL_MEAN,
        pixel_std=file.pixel_std or _PIXEL_STD,
    )
    return spec, [of_heads, of_activation]


def class_embedder_record(
    sources: Sources, shapes: Shapes, _autoencoder: AutoencoderSpec
) -> tuple[ClassEmbedderSpec, list[Assumption]]:
    """Return the record of a class embedding, and its assumed null class.

    Raises:
        WeightsError: The configuration has another number of classes.
        ExportError: There is no such null class.
    """
    rows, width = read_class_embedding(shapes)
    null_class, source = _null_class(sources, rows)
    if null_class is not None and not 0 <= null_class < rows:
        raise ExportError(
            f"the null class is {null_class} (from {source}), but the class embedding has the rows "
            f"0 to {rows - 1}; give the right one with --null-class"
        )
    spec = ClassEmbedderSpec(num_classes=rows, width=width, null_class=null_class)
    return spec, [assumed("class_embedder.null_class", null_class, source)]


def segmentation_encoder_record(
    sources: Sources, shapes: Shapes, autoencoder: AutoencoderSpec
) -> tuple[SegmentationEncoderSpec, list[Assumption]]:
    """Return the record of a segmentation encoder, which reduces maps of image size to latent size.

    Raises:
        WeightsError: Tensors are missing, or the configuration has another number of downsampling
            steps.
    """
    num_classes, out_channels = read_channel_mapper(shapes)
    num_downsampling_steps, assumption = first_stated(
        "segmentation_encoder.num_downsampling_steps",
        None,
        sources.config.num_downsampling_steps,
        autoencoder.factor.bit_length() - 1,
    )
    if 2**num_downsampling_steps != autoencoder.factor:
        raise WeightsError(
            f"the configuration's cond_stage_config has {num_downsampling_steps} downsampling "
            "steps (n_stages), but the weights' autoencoder has a downsampling factor of "
            f"{autoencoder.factor}; they do not belong to one model"
        )
    spec = SegmentationEncoderSpec(
        num_classes=num_classes,
        out_channels=out_channels,
        num_downsampling_steps=num_downsampling_steps,
    )
    return spec, [assumption]


def depth_estimator_record(
    _sources: Sources, shapes: Shapes, _autoencoder: AutoencoderSpec
) -> tuple[DepthEstimatorSpec, list[Assumption]]:
    """Return the record of a depth estimator, and its assumed heads.

    Raises:
        WeightsError: Tensors are missing or contradict each other.
    """
    spec = read_depth_estimator(shapes)
    return spec, [assumed("depth_estimator.num_heads", spec.num_heads, "family")]


#: Readers of the hyperparameters of each conditioner from its tensors, by the name of its network:
#: each returns a record, and its assumptions.
CONDITIONER_READERS: Mapping[
    str,
    Callable[[Sources, Shapes, AutoencoderSpec], tuple[NetworkSpec, list[Assumption]]],
] = MappingProxyType(
    {
        "text_encoder": text_encoder_record,
        "text_encoder_2": second_text_encoder_record,
        "image_encoder": image_encoder_record,
        "class_embedder": class_embedder_record,
        "segmentation_encoder": segmentation_encoder_record,
        "depth_estimator": depth_estimator_record,
    }
)


def _clip(sources: Sources, shapes: Shapes) -> tuple[TextEncoderSpec, list[Assumption]]:
    spec, notes = _text_encoder(
        sources, read_clip(shapes), "clip", sources.family.clip_activation, is_first=True
    )
    spec = replace(spec, pad_token_id=spec.end_token_id)
    return spec, [*notes, *_of_text(spec)]


def _openclip(
    sources: Sources, shapes: Shapes, *, is_first: bool
) -> tuple[TextEncoderSpec, list[Assumption]]:
    spec, notes = _text_encoder(
        sources, read_openclip(shapes), "openclip", "gelu", is_first=is_first
    )
    return spec, [*notes, *_of_text(spec)]


def _text_encoder(
    sources: Sources,
    clip: ClipShapes,
    kind: Literal["clip", "openclip"],
    activation: Literal["quick_gelu", "gelu"],
    *,
    is_first: bool,
) -> tuple[TextEncoderSpec, list[Assumption]]:
    """Return the record of a text encoder; configurations and files speak of the first alone."""
    config, file = (sources.config, sources.file) if is_first else (ConfigFields(), FileFields())
    num_heads, of_heads = first_stated(
        "text_encoder.num_heads",
        None,
        config.text_num_heads,
        1 if clip.width % _CLIP_HEAD_CHANNELS else clip.width // _CLIP_HEAD_CHANNELS,
        file=file.text_num_heads,
    )
    if clip.width % num_heads:
        raise ExportError(
            f"num_attention_heads is {num_heads}, from the {of_heads.source}, which does not "
            f"divide the text encoder's width {clip.width}"
        )
    activation, of_activation = first_stated(
        "text_encoder.activation",
        None,
        config.text_activation,
        activation,
        file=file.text_activation,
    )
    left_out = _layers_left_out(clip, sources.family, is_trimmed=file.text_layers_trimmed)
    spec = TextEncoderSpec(
        kind=kind,
        width=clip.width,
        num_layers=clip.num_layers,
        context_layers=max(1, clip.num_layers - left_out),
        final_norm=sources.family.text_final_norm,
        pooled_dim=clip.projected_dim,
        num_heads=num_heads,
        feed_forward_dim=clip.feed_forward_dim,
        vocab_size=clip.vocab_size,
        max_tokens=clip.max_tokens,
        activation=activation,
        pad_token_id=_OPENCLIP_PADDING,
    )
    if words := spec.vocab_size - 1 - spec.end_token_id:
        _LOGGER.warning(
            "the text encoder has %d tokens beyond CLIP's vocabulary of %d, which prompts do not "
            "reach; give the words that they stand for as textual inversions, see "
            "`ldm generate --textual-inversion`",
            words,
            spec.end_token_id + 1,
        )
    return spec, [of_heads, of_activation]


def _layers_left_out(clip: ClipShapes, family: FamilyDefaults, *, is_trimmed: bool) -> int:
    """Return how many of the last layers that are there context does not pass.

    Stable Diffusion 2 runs 23 of 24 layers, and tools that make a single file of a diffusers folder
    write those 23 (`scripts/convert_diffusers_to_original_stable_diffusion.py` of diffusers). A
    pooled output passes every layer, so that an encoder that has one is never trimmed.
    """
    left_out = family.text_layers_left_out
    if clip.projected_dim is not None:
        return left_out
    released = OPENCLIP_LAYERS.get(clip.width)
    return 0 if is_trimmed or clip.num_layers + left_out == released else left_out


def _of_text(spec: TextEncoderSpec) -> list[Assumption]:
    return [
        assumed("text_encoder.pad_token_id", spec.pad_token_id, "family"),
        assumed("text_encoder.context_layers", spec.context_layers, "family"),
    ]


def _null_class(sources: Sources, rows: int) -> tuple[int | None, str]:
    """Return the null class, or None, and the source of that.

    A configuration counts the rows of the embedding. One that counts a class less, or that has a
    share of labels to drop in training (`ucg_rate`), keeps the last row for the null class.
    """
    config = sources.config
    if config.num_classes not in (None, rows, rows - 1):
        raise WeightsError(
            f"the configuration says model.params.cond_stage_config.params.n_classes is "
            f"{config.num_classes}, but the weights have {rows} rows; is it the configuration of "
            "another checkpoint?"
        )
    if sources.flags.null_class is not None:
        return sources.flags.null_class, "flag"
    if config.num_classes == rows - 1 or config.class_dropout:
        return rows - 1, "config"
    if config.class_dropout is not None:
        return None, "config"
    return sources.family.null_class, "family"
