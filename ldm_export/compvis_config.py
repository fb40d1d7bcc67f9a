"""The facts that a CompVis `config.yaml` adds to a checkpoint's weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ldm_export.errors import ExportError, WeightsError
from ldm_runtime.manifest import ModelSpec, PredictionType

_MAX_BYTES = 1 << 20
_PARAMETERIZATIONS: Mapping[str, PredictionType] = {
    "eps": "epsilon",
    "v": "v_prediction",
    "x0": "sample",
}
_ABSENT = object()

Config = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ConfigFacts:
    """What a configuration says that no shape tells; None where it says nothing."""

    prediction_type: PredictionType | None = None
    latent_scale_factor: float | None = None
    latent_size: int | None = None
    linear_start: float | None = None
    linear_end: float | None = None
    num_train_timesteps: int | None = None
    num_heads: int | None = None
    num_head_channels: int | None = None
    text_num_heads: int | None = None
    text_activation: Literal["quick_gelu", "gelu"] | None = None


def read_config(path: Path) -> Config:
    """Read a YAML file without making objects of the classes it names.

    Raises:
        ExportError: The file cannot be read, is no YAML, or is no CompVis configuration.
    """
    import yaml  # deferred: only `--config` needs it

    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise ExportError(f"{path} has {size} bytes, which is no model configuration")
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ExportError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ExportError(f"{path} holds {type(config).__name__}, not the mapping `model: …`")
    _params(config)
    return config


def config_facts(config: Config | None) -> ConfigFacts:
    """Return the facts in a configuration that the weights cannot tell.

    Raises:
        ExportError: One of them has an impossible value, or the noise schedule is not "linear".
    """
    if config is None:
        return ConfigFacts()
    params = _params(config)
    schedule = params.get("beta_schedule", "linear")
    if schedule != "linear":
        raise ExportError(
            f"config: beta_schedule {schedule!r} is not exported by this version; only 'linear' is"
        )
    return ConfigFacts(
        prediction_type=_choice(params, "parameterization", _PARAMETERIZATIONS),
        latent_scale_factor=(
            None if params.get("scale_by_std") else _number(params, "scale_factor")
        ),
        latent_size=_integer(params, "image_size"),
        linear_start=_number(params, "linear_start"),
        linear_end=_number(params, "linear_end"),
        num_train_timesteps=_integer(params, "timesteps"),
        num_heads=_integer(params, "unet_config.params.num_heads"),
        num_head_channels=_integer(params, "unet_config.params.num_head_channels"),
        text_num_heads=_integer(params, "cond_stage_config.params.num_attention_heads"),
        text_activation=_choice(
            params,
            "cond_stage_config.params.hidden_act",
            {"quick_gelu": "quick_gelu", "gelu": "gelu"},
        ),
    )


def check_architecture(config: Config | None, spec: ModelSpec) -> None:
    """Check that what a configuration says about shapes is what the weights have.

    Raises:
        WeightsError: It says something else.
    """
    if config is None:
        return
    params = _params(config)
    for path, found in _architecture(spec).items():
        value = _get(params, path)
        said = tuple(value) if isinstance(value, list) else value
        if said is _ABSENT or said == found:
            continue
        # One number may stand for every level, or be repeated for each.
        if isinstance(said, tuple) and set(said) == {found}:
            continue
        raise WeightsError(
            f"the configuration says model.params.{path} is {value}, but the weights have {found}; "
            "is it the configuration of another checkpoint?"
        )


def _architecture(spec: ModelSpec) -> Mapping[str, int | tuple[int, ...]]:
    unet, first_stage = spec.unet, spec.autoencoder
    depths = {depth for depth in (*unet.transformer_depth, unet.middle_depth) if depth}
    of_unet: dict[str, int | tuple[int, ...]] = {
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "model_channels": unet.model_channels,
        "channel_mult": unet.channel_mult,
        "num_res_blocks": unet.num_res_blocks,
        "context_dim": unet.context_dim,
        "transformer_depth": depths.pop() if len(depths) == 1 else unet.transformer_depth,
    }
    of_first_stage: dict[str, int | tuple[int, ...]] = {
        "embed_dim": first_stage.embed_dim,
        "ddconfig.z_channels": first_stage.z_channels,
        "ddconfig.ch": first_stage.channels,
        "ddconfig.ch_mult": first_stage.channel_mult,
        "ddconfig.num_res_blocks": first_stage.num_res_blocks,
        "ddconfig.in_channels": first_stage.image_channels,
    }
    return {f"unet_config.params.{name}": value for name, value in of_unet.items()} | {
        f"first_stage_config.params.{name}": value for name, value in of_first_stage.items()
    }


def _params(config: Config) -> Config:
    params = _get(config, "model.params")
    if not isinstance(params, dict):
        raise ExportError(
            "the configuration has no `model: params:` mapping; give the config.yaml of a CompVis "
            "checkpoint, or the facts by flags"
        )
    return params


def _get(config: Config, path: str) -> object:
    value: object = config
    for key in path.split("."):
        if not isinstance(value, dict):
            return _ABSENT
        value = value.get(key, _ABSENT)
    return _ABSENT if value is None else value


def _number(params: Config, path: str) -> float | None:
    value = _get(params, path)
    if value is _ABSENT:
        return None
    try:
        # YAML 1.1 reads 1e-4, without a point, as text.
        number = float(value) if isinstance(value, str | int | float) else 0.0
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ExportError(f"config: {path} is {value!r}; a positive number was expected")
    return number


def _integer(params: Config, path: str) -> int | None:
    """Return a positive integer; -1 is CompVis's way to leave a number open."""
    value = _get(params, path)
    if value is _ABSENT or value == -1:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ExportError(f"config: {path} is {value!r}; a positive integer was expected")
    return value


def _choice(params: Config, path: str, choices: Mapping[str, T]) -> T | None:
    value = _get(params, path)
    if value is _ABSENT:
        return None
    if not isinstance(value, str) or value not in choices:
        raise ExportError(f"config: {path} is {value!r}; choose from {', '.join(choices)}")
    return choices[value]
