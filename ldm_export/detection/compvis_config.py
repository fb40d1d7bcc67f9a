"""The features that a CompVis `config.yaml` adds to a checkpoint's weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from ldm_export.detection.own_sections import SamplingFields, label_names, sampling_fields
from ldm_export.detection.yaml_file import UnplainYamlError, read_yaml
from ldm_export.errors import ExportError, ForeignConfigError
from ldm_export.families.records import WeightsChoice
from ldm_export.hyperparameters.shapes import listed
from ldm_runtime.inputs.reading import shown
from ldm_runtime.specs.model import PredictionType

#: More than any model has: training timesteps, latent pixels per side, and pixels per side.
_MAX_TIMESTEPS, _MAX_LATENTS, _MAX_PIXELS = 100_000, 2048, 16384
#: Likewise: attention heads or their channels, classes, and downsampling steps.
_MAX_HEADS, _MAX_CLASSES, _MAX_STEPS = 65536, 10_000_000, 16
_PARAMETERIZATIONS: Mapping[str, PredictionType] = {
    "eps": "epsilon",
    "v": "v_prediction",
    "x0": "sample",
}
#: Where Stability's generative-models say what a UNet predicts, and its classes. `EDMScaling` is of
#: Karras et al. 2022 (arXiv:2206.00364), whose F is called "epsilon" here, see `golden.prediction`.
SCALING = "denoiser_config.params.scaling_config.target"
_SCALINGS: Mapping[str, PredictionType] = {
    "EpsScaling": "epsilon",
    "VScaling": "v_prediction",
    "VScalingWithEDMcNoise": "v_prediction",
    "EDMScaling": "epsilon",
}
_UNETS = ("unet_config", "network_config")
_AUTOENCODER_ONLY: Mapping[str, object] = {
    "ddconfig.tanh_out": False,
    "ddconfig.give_pre_end": False,
    "ddconfig.resamp_with_conv": True,
}
#: Entries of `model: params:`, of which every configuration of CompVis or Stability has one.
_ENTRIES = frozenset(
    {
        *("unet_config", "first_stage_config", "cond_stage_config", "ddconfig"),
        *("network_config", "conditioner_config", "denoiser_config"),
        *("beta_schedule", "given_betas", "linear_start", "linear_end", "timesteps"),
        *("parameterization", "conditioning_key", "use_ema", "scale_factor", "scale_by_std"),
        *("image_size", "embed_dim", "n_embed"),
    }
)
#: The result of `lookup` for an entry that is not there.
ABSENT = object()

Config = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ConfigFields:
    """The features in a configuration that no shape tells; None where it says nothing.

    Attributes:
        weights: Set of trained weights to sample with.
        prediction_type: Prediction target of the UNet.
        usual_prediction_type: The one that CompVis' class has unless told, where nothing is said.
        latent_scale_factor: Multiplies the autoencoder's latents into the UNet's.
        scale_by_std: Whether it was measured in training, and is a tensor of the checkpoint.
        latent_size: Height and width in latent pixels that the UNet was trained on.
        resolution: Height and width in pixels that the autoencoder was trained on.
        linear_start: First beta of the schedule that is linear in sqrt(beta) …
        linear_end: … and the last, after …
        num_train_timesteps: … this number of steps.
        given_betas: Betas, listed one by one instead.
        num_heads: Attention heads of the UNet.
        num_head_channels: Channels per head of the UNet.
        text_num_heads: Attention heads of a CLIP text encoder.
        text_activation: Feed-forward activation of a CLIP text encoder.
        num_classes: Classes of a class embedding.
        class_dropout: Share of labels that training replaced by the last class.
        num_downsampling_steps: Downsampling steps of a segmentation encoder.
        sampling: Sampling defaults, of this project's own section.
        label_names: Names of labels, of another.
    """

    weights: WeightsChoice | None = None
    prediction_type: PredictionType | None = None
    usual_prediction_type: PredictionType | None = None
    latent_scale_factor: float | None = None
    scale_by_std: bool = False
    latent_size: int | None = None
    resolution: int | None = None
    linear_start: float | None = None
    linear_end: float | None = None
    num_train_timesteps: int | None = None
    given_betas: tuple[float, ...] | None = None
    num_heads: int | None = None
    num_head_channels: int | None = None
    text_num_heads: int | None = None
    text_activation: Literal["quick_gelu", "gelu"] | None = None
    num_classes: int | None = None
    class_dropout: float | None = None
    num_downsampling_steps: int | None = None
    sampling: SamplingFields = field(default_factory=SamplingFields)
    label_names: tuple[str, ...] | None = None


def read_config(path: Path) -> Config:
    """Read a YAML file without making objects of the classes it names.

    Raises:
        ExportError: The file cannot be read or is too large, is not YAML, or uses a part of YAML
            that no configuration needs.
        ForeignConfigError: It is YAML, but not a CompVis configuration.
    """
    try:
        config = read_yaml(path, wanted=("model", "params"))
    except UnplainYamlError as error:
        if error.has_wanted:
            raise
        raise _foreign(path, f"it has no `model: params:` mapping, and {error.fault}") from error
    if not isinstance(config, dict):
        raise _foreign(path, f"it holds {type(config).__name__}")
    params = lookup(config, "model.params")
    if not isinstance(params, dict):
        raise _foreign(path, f"it has no `model: params:` mapping; {_entries(config)}")
    if params and _ENTRIES.isdisjoint(params):
        raise _foreign(path, f"nothing under `model: params:` is CompVis'; {_entries(params)}")
    return config


def _foreign(path: Path, fault: str) -> ForeignConfigError:
    return ForeignConfigError(
        f"{path} is not the configuration of a CompVis model ({fault}); give the checkpoint's own "
        "with --config FILE, or --config none and the features by flags"
    )


def _entries(config: Config) -> str:
    return f"its entries are {listed(map(shown, config), limit=5)}"


def config_fields(config: Config | None) -> ConfigFields:
    """Return the features in a configuration that the weights cannot tell.

    Raises:
        ExportError: One of them has an impossible value, or one that is not exported.
    """
    if config is None:
        return ConfigFields()
    params = params_of(config)
    _check_exported(params)
    return ConfigFields(
        weights=_weights(params),
        prediction_type=_prediction_type(params),
        usual_prediction_type=_usual_prediction_type(config),
        latent_scale_factor=(
            None if params.get("scale_by_std") else _number(params, "scale_factor")
        ),
        scale_by_std=bool(params.get("scale_by_std")),
        latent_size=_integer(params, "image_size", _MAX_LATENTS),
        resolution=_integer(autoencoder_config_of(params), "ddconfig.resolution", _MAX_PIXELS),
        linear_start=_number(params, "linear_start"),
        linear_end=_number(params, "linear_end"),
        num_train_timesteps=_integer(params, "timesteps", _MAX_TIMESTEPS),
        given_betas=_betas(params, "given_betas"),
        num_heads=_of_unet(params, "num_heads", _MAX_HEADS),
        num_head_channels=_of_unet(params, "num_head_channels", _MAX_HEADS),
        text_num_heads=_integer(params, "cond_stage_config.params.num_attention_heads", _MAX_HEADS),
        text_activation=_choice(
            params,
            "cond_stage_config.params.hidden_act",
            {"quick_gelu": "quick_gelu", "gelu": "gelu"},
        ),
        num_classes=_integer(params, "cond_stage_config.params.n_classes", _MAX_CLASSES),
        class_dropout=_share(params, "cond_stage_config.params.ucg_rate"),
        num_downsampling_steps=_integer(params, "cond_stage_config.params.n_stages", _MAX_STEPS),
        sampling=sampling_fields(config),
        label_names=label_names(config),
    )


def params_of(config: Config) -> Config:
    """Return the mapping `model: params:`, which has every entry that is read.

    Raises:
        ExportError: There is none.
    """
    params = lookup(config, "model.params")
    if not isinstance(params, dict):
        raise ForeignConfigError(
            "the configuration has no `model: params:` mapping; give the config.yaml of a CompVis "
            "checkpoint, or the features by flags"
        )
    return params


def autoencoder_config_of(params: Config) -> Config:
    """Return the entries of the autoencoder: all of them, if the model is one, else a part."""
    part = lookup(params, "first_stage_config.params")
    if isinstance(part, dict):
        return part
    return params if "ddconfig" in params else {}


def takes_embeddings(config: Config | None) -> bool:
    """Return whether a configuration says that the model is conditioned by its input as it is."""
    if config is None:
        return False
    return class_name(lookup(config, "model.params.cond_stage_config.target")) == "Identity"


def class_name(target: object) -> str:
    """Return the last part of the name of a class, or "" for what is not text."""
    return target.rpartition(".")[2] if isinstance(target, str) else ""


def lookup(config: Config, path: str) -> object:
    """Return the entry at a dotted path, or `ABSENT` if there is none or it is empty."""
    value: object = config
    for key in path.split("."):
        if not isinstance(value, dict):
            return ABSENT
        value = value.get(key, ABSENT)
    return ABSENT if value is None else value


def _check_exported(params: Config) -> None:
    """Check that no entry asks for arithmetic that weights do not show and networks do not do."""
    only: dict[str, object] = {
        "beta_schedule": "linear",
        "unet_config.params.use_new_attention_order": False,
        "unet_config.params.num_heads_upsample": -1,
        "unet_config.params.conv_resample": True,
        "cond_stage_config.params.method": "bilinear",
        "cond_stage_config.params.multiplier": 0.5,
    }
    place = "" if autoencoder_config_of(params) is params else "first_stage_config.params."
    only = only | {f"{place}{path}": exported for path, exported in _AUTOENCODER_ONLY.items()}
    for path, exported in only.items():
        value = lookup(params, path)
        if value is not ABSENT and value != exported:
            raise ExportError(
                f"config: {path} {shown(repr(value))} is not exported by this version; "
                f"only {exported!r} is"
            )


def _weights(params: Config) -> WeightsChoice | None:
    """Return the set of weights that `use_ema` asks for, or None without that entry."""
    value = lookup(params, "use_ema")
    if value is ABSENT:
        return None
    if not isinstance(value, bool):
        raise ExportError(f"config: use_ema is {shown(repr(value))}; true or false was expected")
    return "ema" if value else "model"


def _prediction_type(params: Config) -> PredictionType | None:
    """Return what a configuration of CompVis, or of generative-models, says is predicted."""
    stated = _choice(params, "parameterization", _PARAMETERIZATIONS)
    scaling = lookup(params, SCALING)
    if stated is not None or scaling is ABSENT:
        return stated
    name = class_name(scaling)
    if name not in _SCALINGS:
        raise ExportError(
            f"config: {SCALING} is {shown(repr(scaling))}; choose from {', '.join(_SCALINGS)}"
        )
    return _SCALINGS[name]


def _usual_prediction_type(config: Config) -> PredictionType | None:
    """Return the noise for a model of CompVis whose `parameterization` is not given.

    Source: `DDPM.__init__` of CompVis/latent-diffusion (ldm/models/diffusion/ddpm.py, a506df5),
    from which `LatentDiffusion` and all its kinds inherit; Stable Diffusion 2 has it unchanged.
    """
    params = params_of(config)
    is_theirs = class_name(lookup(config, "model.target")).endswith("Diffusion")
    is_stated = lookup(params, "parameterization") is not ABSENT
    has_unet = lookup(params, "unet_config") is not ABSENT
    return "epsilon" if is_theirs and has_unet and not is_stated else None


def _of_unet(params: Config, name: str, most: int) -> int | None:
    """Return a number of the UNet, which generative-models calls `network_config`."""
    found = (_integer(params, f"{part}.params.{name}", most) for part in _UNETS)
    return next((number for number in found if number is not None), None)


def _number(params: Config, path: str) -> float | None:
    value = lookup(params, path)
    if value is ABSENT:
        return None
    try:
        # YAML 1.1 reads 1e-4, without a point, as text.
        number = float(value) if isinstance(value, str | int | float) else 0.0
    except (ValueError, OverflowError):
        number = 0.0
    if not 0 < number < float("inf"):
        raise ExportError(f"config: {path} is {shown(repr(value))}; a positive number was expected")
    return number


def _betas(params: Config, path: str) -> tuple[float, ...] | None:
    """Return a list of noise levels; CompVis reads it before the numbers of the formula."""
    value = lookup(params, path)
    if value is ABSENT:
        return None
    if not isinstance(value, list) or not 0 < len(value) <= _MAX_TIMESTEPS:
        raise ExportError(
            f"config: {path} must be a list of 1 to {_MAX_TIMESTEPS} betas, got "
            f"{type(value).__name__}"
        )
    betas = [_number({path: each}, path) or 0.0 for each in value]
    if wrong := [each for each in betas if not 0 < each < 1]:
        raise ExportError(f"config: {path} has {wrong[0]:g}; every beta lies between 0 and 1")
    return tuple(betas)


def _integer(params: Config, path: str, most: int) -> int | None:
    """Return a positive integer, at most `most`; -1 is CompVis' way to leave a number open."""
    value = lookup(params, path)
    if value is ABSENT or value == -1:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ExportError(
            f"config: {path} is {shown(repr(value))}; a positive integer was expected"
        )
    if value > most:
        raise ExportError(f"config: {path} is {shown(repr(value))}; at most {most} was expected")
    return value


def _share(params: Config, path: str) -> float | None:
    value = lookup(params, path)
    if value is ABSENT:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ExportError(
            f"config: {path} is {shown(repr(value))}; a number from 0 to 1 was expected"
        )
    return float(value)


def _choice(params: Config, path: str, choices: Mapping[str, T]) -> T | None:
    value = lookup(params, path)
    if value is ABSENT:
        return None
    if not isinstance(value, str) or value not in choices:
        raise ExportError(
            f"config: {path} is {shown(repr(value))}; choose from {', '.join(choices)}"
        )
    return choices[value]
