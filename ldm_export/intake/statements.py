"""The features that the configuration files of a diffusers folder state, as `FileFields` has them.

Sources: `SchedulerMixin` classes, `UNet2DConditionModel`, `AutoencoderKL` and
`StableDiffusionXLPipeline` of diffusers 0.42.1, and `CLIPTextConfig` of transformers 5. What is not
stated has the default of those classes. The entries that change what a network computes without a
trace in its shapes are compared with those of Stable Diffusion.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import numpy as np

from ldm_export.checkpoint.file_fields import StatedSchedule, cosine_betas
from ldm_export.errors import CheckpointError
from ldm_export.intake.json_files import Entries
from ldm_runtime.specs.model import EdmSpec, PredictionType

_MAX_TIMESTEPS = 100_000
_DEFAULTS: Entries = MappingProxyType(
    {
        "num_train_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
    }
)
_DISTILLED: Entries = MappingProxyType(
    {**_DEFAULTS, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
)
_OTHER_DEFAULTS: Mapping[object, Entries] = MappingProxyType(
    {"LCMScheduler": _DISTILLED, "TCDScheduler": _DISTILLED}
)
_EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_EDM_DEFAULTS: Entries = MappingProxyType(
    {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "prediction_type": "epsilon"}
)
#: Beginnings of schedulers whose models were trained with noise of another kind.
_OTHER_NOISE = ("EDM", "FlowMatch")

_UNET: Entries = MappingProxyType(
    {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "center_input_sample": False,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "resnet_time_scale_shift": "default",
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "dual_cross_attention": False,
        "attention_type": "default",
        "time_embedding_type": "positional",
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "cross_attention_norm": None,
        "num_attention_heads": None,
    }
)
_AUTOENCODER: Entries = MappingProxyType(
    {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "norm_num_groups": 32,
        "shift_factor": None,
    }
)
_ZEROS = "force_zeros_for_empty_prompt"
_ENCODER: Entries = MappingProxyType({"layer_norm_eps": 1e-5, "num_channels": 3})
#: Entries of CLIP's image processor; images are resized, cropped and normalised as here.
_FEATURE_EXTRACTOR: Entries = MappingProxyType(
    {
        "do_resize": True,
        "do_center_crop": True,
        "do_normalize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "resample": 3,  # Pillow's number of BICUBIC
    }
)

_SMALL_IMAGE_NOISE = StatedSchedule(linear_start=0.0001, linear_end=0.02, num_train_timesteps=1000)
_DEPTH_ESTIMATOR: Entries = MappingProxyType(
    {
        "is_hybrid": True,
        "hidden_act": "gelu",
        "patch_size": 16,
        "backbone_out_indices": [2, 5, 8, 11],
        "readout_type": "project",
        "reassemble_factors": [1, 1, 1, 0.5],
        "use_batch_norm_in_fusion_residual": False,
        "add_projection": False,
        "head_in_index": -1,
    }
)
_DEPTH_BACKBONE: Entries = MappingProxyType(
    {
        "model_type": "bit",
        "layer_type": "bottleneck",
        "hidden_act": "relu",
        "num_groups": 32,
        "width_factor": 1,
        "output_stride": 32,
    }
)


def pipeline_fields(path: Path, entries: Entries) -> dict[str, Any]:
    """Return what a pipeline's settings state of SDXL.

    These are what an empty negative prompt is, and the scale of the latents of an image to edit.

    Args:
        path: Their file, for errors.
        entries: Its entries.

    Raises:
        CheckpointError: A value is impossible.
    """
    stated: dict[str, Any] = {}
    if (zeros := _choice(path, entries, _ZEROS)) is not None:
        stated["null_prompt"] = "zeros" if zeros else "encoded"
    if (scales := _choice(path, entries, "is_cosxl_edit")) is not None:
        stated["scales_image"] = scales
    return stated


def scheduler_fields(path: Path, entries: Entries) -> dict[str, Any]:
    """Return what a scheduler's configuration states of the noise in training.

    Args:
        path: Its file, for errors.
        entries: Its entries.

    Raises:
        CheckpointError: The scheduler is of a kind that is not exported, or a value is impossible.
    """
    name = entries.get("_class_name")
    if name in _EDM_SCHEDULERS:
        return _edm_fields(path, {**_EDM_DEFAULTS, **entries})
    if isinstance(name, str) and name.startswith(_OTHER_NOISE):
        raise CheckpointError(
            path,
            f"is of {name!a:.60}, whose models are trained without betas; models with a noise "
            "schedule of betas are exported, and those of EDM",
        )
    stated = {**_OTHER_DEFAULTS.get(name, _DEFAULTS), **entries}
    return {
        "prediction_type": _one_of(path, stated, "prediction_type", get_args(PredictionType)),
        "zero_terminal_snr": stated.get("rescale_betas_zero_snr") is True,
        "schedule": _schedule(path, stated),
    }


def unet_fields(path: Path, entries: Entries, factor: int | None) -> dict[str, Any]:
    """Return what a UNet's configuration states: heads, and the size of images.

    Args:
        path: Its file, for errors.
        entries: Its entries.
        factor: Pixels per latent pixel in each direction, or None if that is not known.

    Raises:
        CheckpointError: It is not a UNet of Stable Diffusion, or a value is impossible.
    """
    _check(path, entries, _UNET)
    fields = _heads(path, entries)
    if factor is None or entries.get("sample_size") is None:
        return fields
    size = _integers(path, "sample_size", entries["sample_size"])
    return {**fields, "height": size[0] * factor, "width": size[-1] * factor}


def autoencoder_fields(path: Path, entries: Entries) -> dict[str, Any]:
    """Return what an autoencoder's configuration states: the scale of its latents, and precision.

    `force_upcast` is true by default, and in folders of Stable Diffusion 1 which do not need it:
    only where it is false does it state something.

    Raises:
        CheckpointError: It is not an autoencoder of Stable Diffusion, or a value is impossible.
    """
    _check(path, entries, _AUTOENCODER)
    fields: dict[str, Any] = {
        name: _numbers(path, name, entries[name])
        for name in ("latents_mean", "latents_std")
        if entries.get(name) is not None
    }
    factor = entries.get("scaling_factor")
    if factor is not None:
        fields["latent_scale_factor"] = _positive(path, "scaling_factor", factor)
    if _choice(path, entries, "force_upcast") is False:
        fields["vae_fits_fp16"] = True
    return fields


def downsampling_factor(path: Path, entries: Entries) -> int:
    """Return the pixels per latent pixel of an autoencoder: a step between two of its levels."""
    channels = entries.get("block_out_channels", [1])
    return int(2 ** (len(_integers(path, "block_out_channels", channels)) - 1))


def text_encoder_fields(path: Path, entries: Entries, *, openclip: bool) -> dict[str, Any]:
    """Return what a text encoder's configuration states: heads and activation.

    Args:
        path: Its file, for errors.
        entries: Its entries.
        openclip: Whether it is of OpenCLIP, whose activation is the usual GELU.

    Raises:
        CheckpointError: It is not one that is exported, or a value is impossible.
    """
    expected = ("gelu",) if openclip else ("quick_gelu", "gelu")
    heads, activation = _encoder(path, {"num_attention_heads": 8, **entries}, expected)
    return {"text_num_heads": heads, "text_activation": activation}


def image_encoder_fields(path: Path, entries: Entries) -> dict[str, Any]:
    """Return what an image encoder's configuration states: heads and activation.

    Raises:
        CheckpointError: It is not one that is exported, or a value is impossible.
    """
    stated = {"num_attention_heads": 12, **entries}
    heads, activation = _encoder(path, stated, ("quick_gelu", "gelu"))
    return {"image_num_heads": heads, "image_activation": activation}


def _encoder(path: Path, stated: Entries, activations: tuple[str, ...]) -> tuple[int, str]:
    """Return the heads and the activation of one of CLIP's encoders."""
    _check(path, stated, _ENCODER)
    activation = _one_of(path, {"hidden_act": "quick_gelu", **stated}, "hidden_act", activations)
    return _integers(path, "num_attention_heads", stated["num_attention_heads"])[0], activation


def feature_extractor_fields(path: Path, entries: Entries) -> dict[str, Any]:
    """Return what the configuration of CLIP's image processor states: size, mean and deviation.

    Raises:
        CheckpointError: It prepares images in another way, or a value is impossible.
    """
    _check(path, entries, _FEATURE_EXTRACTOR)
    size, crop = entries.get("size", 224), entries.get("crop_size", 224)
    short = size.get("shortest_edge") if isinstance(size, dict) else size
    sides = [crop.get(name) for name in ("height", "width")] if isinstance(crop, dict) else [crop]
    if any(side != short for side in sides):
        raise _unexpected(path, "crop_size", crop, (f"the size, {short!a:.60}",))
    fields: dict[str, Any] = {"image_size": _integers(path, "size", short)[0]}
    for name, field in (("image_mean", "pixel_mean"), ("image_std", "pixel_std")):
        if name in entries:
            values = entries[name]
            if not isinstance(values, list) or len(values) != 3:
                raise _unexpected(path, name, values, ("three numbers",))
            fields[field] = tuple(_positive(path, name, value) for value in values)
    return fields


def _edm_fields(path: Path, stated: Entries) -> dict[str, Any]:
    """Return what a scheduler of EDM states: noise levels, and how the output is read."""
    names = ("sigma_min", "sigma_max", "sigma_data")
    levels = {name: _positive(path, name, stated[name]) for name in names}
    predicted = ("epsilon", "v_prediction")
    return {
        "prediction_type": _one_of(path, stated, "prediction_type", predicted),
        "edm": EdmSpec(**levels),
    }


def check_depth_estimator(path: Path, entries: Entries) -> None:
    """Check that a depth estimator computes as that of Stable Diffusion 2, where no shape tells.

    Its `layer_norm_eps` may be any: 1e-12 in its folders and 1e-6 in its checkpoints.

    Raises:
        CheckpointError: It does not.
    """
    _check(path, entries, _DEPTH_ESTIMATOR)
    backbone = entries.get("backbone_config")
    if isinstance(backbone, Mapping):
        _check(path, backbone, _DEPTH_BACKBONE)


def check_small_image_noise(path: Path, fields: Mapping[str, Any]) -> None:
    """Check that an image to enlarge has noise of the schedule that every bundle adds it by.

    It is that of `x4-upscaling.yaml` in Stability-AI/stablediffusion (cf1d67a).

    Args:
        path: The file of the scheduler, for errors.
        fields: The result of `scheduler_fields`; empty where there is no file.

    Raises:
        CheckpointError: It has not.
    """
    schedule, ends_in_noise = fields.get("schedule"), fields.get("zero_terminal_snr")
    if not fields or (schedule == _SMALL_IMAGE_NOISE and not ends_in_noise):
        return
    end = " down to nothing but noise" if ends_in_noise else ""
    raise CheckpointError(
        path,
        f"adds noise to the image to enlarge by {_shown(schedule)}{end}, which is not exported; "
        f"expected {_shown(_SMALL_IMAGE_NOISE)}",
    )


def _shown(schedule: StatedSchedule | None) -> str:
    if schedule is None or schedule.betas is not None:
        return "betas of another kind or none"
    first, last = schedule.linear_start, schedule.linear_end
    return f"scaled_linear betas from {first:g} to {last:g} in {schedule.num_train_timesteps} steps"


def _schedule(path: Path, stated: Entries) -> StatedSchedule:
    trained = stated.get("trained_betas")
    if trained is not None:
        return _listed_betas(path, trained)
    number = _integers(path, "num_train_timesteps", stated["num_train_timesteps"])[0]
    if number > _MAX_TIMESTEPS:
        raise _unexpected(path, "num_train_timesteps", number, (f"1 to {_MAX_TIMESTEPS}",))
    start, end = (_positive(path, name, stated[name]) for name in ("beta_start", "beta_end"))
    kind, betas = stated["beta_schedule"], None
    if kind == "linear":
        betas = tuple(np.linspace(start, end, number, dtype=np.float64).tolist())
    elif kind == "squaredcos_cap_v2":
        betas = cosine_betas(number)
    elif kind != "scaled_linear":
        kinds = ("scaled_linear", "linear", "squaredcos_cap_v2")
        raise _unexpected(path, "beta_schedule", kind, kinds)
    return StatedSchedule(
        linear_start=start, linear_end=end, num_train_timesteps=number, betas=betas
    )


def _listed_betas(path: Path, trained: object) -> StatedSchedule:
    values = trained if isinstance(trained, list) else []
    betas = tuple(_positive(path, "trained_betas", value) for value in values)
    if not 0 < len(betas) <= _MAX_TIMESTEPS or max(betas) >= 1:
        raise _unexpected(path, "trained_betas", trained, ("numbers between 0 and 1",))
    return StatedSchedule(
        linear_start=betas[0], linear_end=betas[-1], num_train_timesteps=len(betas), betas=betas
    )


def _heads(path: Path, entries: Entries) -> dict[str, Any]:
    """Return heads or their channels: diffusers calls the number of heads `attention_head_dim`."""
    heads = _integers(path, "attention_head_dim", entries.get("attention_head_dim", 8))
    if len(set(heads)) == 1:
        return {"num_heads": heads[0]}
    channels = _integers(path, "block_out_channels", entries.get("block_out_channels", [1]))
    sizes = {width / count for width, count in zip(channels, heads, strict=False)}
    if len(channels) != len(heads) or len(sizes) != 1 or not (size := sizes.pop()).is_integer():
        expected = ("one number of heads", "one number of channels per head")
        raise _unexpected(path, "attention_head_dim", list(heads), expected)
    return {"num_head_channels": int(size)}


def _check(path: Path, entries: Entries, expected: Entries) -> None:
    for name, value in expected.items():
        if name in entries and entries[name] != value:
            raise _unexpected(path, name, entries[name], (str(value),))


def _integers(path: Path, name: str, value: object) -> tuple[int, ...]:
    """Return a number that may be listed per level."""
    values = value if isinstance(value, list | tuple) else [value]
    if not values or not all(type(each) is int and 0 < each < 1 << 20 for each in values):
        raise _unexpected(path, name, value, ("a positive number", "a list of them"))
    return tuple(values)


def _numbers(path: Path, name: str, value: object) -> tuple[float, ...]:
    """Return numbers that are listed per channel, perhaps each in a list of its own."""
    try:
        numbers = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        numbers = np.array(math.nan)
    if not np.isfinite(numbers).all():
        raise _unexpected(path, name, value, ("a number per channel",))
    return tuple(numbers.reshape(-1).tolist())


def _choice(path: Path, entries: Entries, name: str) -> bool | None:
    """Return what an entry says, or None if it is not there."""
    value = entries.get(name)
    if value is not None and not isinstance(value, bool):
        raise _unexpected(path, name, value, ("true", "false"))
    return value


def _one_of(path: Path, stated: Entries, name: str, choices: tuple[str, ...]) -> str:
    value = stated[name]
    if not isinstance(value, str) or value not in choices:
        raise _unexpected(path, name, value, choices)
    return value


def _positive(path: Path, name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise _unexpected(path, name, value, ("a positive number",))
    return float(value)


def _unexpected(path: Path, name: str, value: object, expected: tuple[str, ...]) -> CheckpointError:
    shown = f"{value!a}"[:60]
    return CheckpointError(
        path, f"says {name} = {shown}, which is not exported; expected {' or '.join(expected)}"
    )
