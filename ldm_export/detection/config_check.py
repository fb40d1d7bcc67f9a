"""The check that a CompVis `config.yaml` describes the model that its checkpoint holds."""

from collections.abc import Mapping

from ldm_export.detection.compvis_config import (
    ABSENT,
    SCALING,
    Config,
    autoencoder_config_of,
    class_name,
    lookup,
    params_of,
)
from ldm_export.errors import WeightsError
from ldm_runtime.inputs.reading import shown
from ldm_runtime.specs.model import ModelSpec, Task
from ldm_runtime.specs.networks import (
    AutoencoderSpec,
    ClassEmbedderSpec,
    Depths,
    SegmentationEncoderSpec,
    TextEncoderSpec,
    UNetSpec,
)

Value = bool | int | str | Depths

#: Tasks of each conditioner of CompVis, by the last part of its class's name.
_CONDITIONERS: Mapping[str, tuple[Task, ...]] = {
    "__is_unconditional__": ("unconditional",),
    "__is_first_stage__": ("inpainting",),
    "Identity": ("super-resolution", "retrieval"),
    "ClassEmbedder": ("class-to-image",),
    "BERTEmbedder": ("text-to-image", "layout-to-image"),
    "SpatialRescaler": ("semantic-synthesis",),
    "FrozenCLIPEmbedder": ("text-to-image", "text-inpainting", "image-editing"),
    "FrozenOpenCLIPEmbedder": (
        *("text-to-image", "text-inpainting", "text-super-resolution", "image-variation"),
        "depth-to-image",
    ),
}
#: Kind of each autoencoder of CompVis, likewise. Under a UNet, `VQModel` would decode without its
#: codebook; as in all released models, only `VQModelInterface` is exported there.
_AUTOENCODERS: Mapping[str, str] = {"AutoencoderKL": "kl", "VQModelInterface": "vq"}


def check_architecture(config: Config | None, spec: ModelSpec) -> None:
    """Check that the hyperparameters in a configuration are those of the weights.

    Raises:
        WeightsError: One of them differs.
    """
    if config is None:
        return
    params = params_of(config)
    autoencoder = autoencoder_config_of(params)
    place = "" if autoencoder is params else "first_stage_config.params."
    _compare(autoencoder, place, _autoencoder(spec.autoencoder))
    _compare(autoencoder, place, _attention_pixels(autoencoder, spec.autoencoder))
    if spec.unet is not None:
        _check_task(params, spec)
        _check_autoencoder(params, spec.autoencoder)
        _check_scaling(params, spec)
        _compare(params, "", _unet(spec.unet) | _conditioning(spec))
        _compare(params, "", _attention_factors(params, spec.unet))


def _compare(params: Config, place: str, found: Mapping[str, Value]) -> None:
    for path, weights in found.items():
        value = lookup(params, path)
        said = tuple(value) if isinstance(value, list) else value
        if said is ABSENT or said == weights:
            continue
        # One number may stand for every level, or be repeated for each.
        if isinstance(said, tuple) and said and all(each == weights for each in said):
            continue
        raise _contradiction(f"{place}{path}", value, weights)


def _contradiction(path: str, said: object, found: object) -> WeightsError:
    return WeightsError(
        f"the configuration says model.params.{path} is {shown(said)}, but the weights have "
        f"{found}; is it the configuration of another checkpoint? Give the right one with "
        "--config FILE, or --config none"
    )


def _check_task(params: Config, spec: ModelSpec) -> None:
    """Check that the conditioner belongs to the task of which the tensors were recognised."""
    value = lookup(params, "cond_stage_config")
    path = "cond_stage_config"
    if isinstance(value, dict):
        value, path = lookup(value, "target"), "cond_stage_config.target"
    tasks = _CONDITIONERS.get(class_name(value))
    if tasks is not None and spec.task not in tasks:
        raise _contradiction(path, value, f"the tensors of a model for {spec.task}")


def _check_autoencoder(params: Config, autoencoder: AutoencoderSpec) -> None:
    path = "first_stage_config.target"
    value = lookup(params, path)
    name = class_name(value)
    if name == "VQModel":
        raise WeightsError(
            f"the configuration says model.params.{path} is {shown(value)}, which decodes "
            "without its codebook and is not exported; only VQModelInterface is"
        )
    if _AUTOENCODERS.get(name, autoencoder.kind) != autoencoder.kind:
        raise _contradiction(
            path, value, f"the tensors of a {autoencoder.kind.upper()} autoencoder"
        )


def _check_scaling(params: Config, spec: ModelSpec) -> None:
    """Check that a scaling of EDM is of a model of EDM: with betas it means another network."""
    value = lookup(params, SCALING)
    if "EDM" in class_name(value) and spec.edm is None:
        marks = "no mark of EDM (edm_mean and edm_std, or edm_vpred.sigma_max)"
        raise _contradiction(SCALING, class_name(value), marks)


def _unet(unet: UNetSpec) -> dict[str, Value]:
    found: dict[str, Value] = {
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "model_channels": unet.model_channels,
        "channel_mult": unet.channel_mult,
        "num_res_blocks": unet.num_res_blocks,
        "use_spatial_transformer": unet.attention == "transformer",
        "use_scale_shift_norm": unet.scale_shift_norm,
        "resblock_updown": unet.resblock_updown,
    }
    if unet.attention == "transformer":
        depths = {depth for depth in (*unet.transformer_depth, unet.middle_depth) if depth}
        one = depths.pop() if len(depths) == 1 else unet.transformer_depth
        found |= {"context_dim": unet.context_dim or 0, "transformer_depth": one}
        found |= {"use_linear_in_transformer": unet.linear_projection}
    return {f"unet_config.params.{name}": value for name, value in found.items()}


def _attention_factors(params: Config, unet: UNetSpec) -> dict[str, Value]:
    """Return the weights' factors with attention, if the configuration names others."""
    path = "unet_config.params.attention_resolutions"
    said = lookup(params, path)
    levels = range(len(unet.channel_mult))
    found = tuple(2**level for level in levels if any(unet.input_depths(level)))
    # Factors that no level has are allowed, and have no effect.
    if isinstance(said, list) and tuple(2**i for i in levels if 2**i in said) == found:
        return {}
    return {path: found}


def _autoencoder(autoencoder: AutoencoderSpec) -> dict[str, Value]:
    found: dict[str, Value] = {
        "embed_dim": autoencoder.embed_dim,
        "ddconfig.z_channels": autoencoder.z_channels,
        "ddconfig.ch": autoencoder.channels,
        "ddconfig.ch_mult": autoencoder.channel_mult,
        "ddconfig.num_res_blocks": autoencoder.num_res_blocks,
        "ddconfig.in_channels": autoencoder.image_channels,
        "ddconfig.out_ch": autoencoder.image_channels,
        "ddconfig.double_z": autoencoder.kind == "kl",
    }
    if autoencoder.codebook_size is not None:
        found["n_embed"] = autoencoder.codebook_size
    return found


def _attention_pixels(params: Config, autoencoder: AutoencoderSpec) -> dict[str, Value]:
    """Return the weights' values of entries that say in pixels which levels have attention."""
    kind, said = lookup(params, "ddconfig.attn_type"), lookup(params, "ddconfig.attn_resolutions")
    resolution = lookup(params, "ddconfig.resolution")
    found: dict[str, Value] = {}
    if isinstance(kind, str) and (kind != "none") != autoencoder.middle_attention:
        found["ddconfig.attn_type"] = "vanilla" if autoencoder.middle_attention else "none"
    if kind != "none" and isinstance(said, list) and isinstance(resolution, int):
        levels = range(len(autoencoder.channel_mult))
        attended = tuple(level for level in levels if resolution // 2**level in said)
        if attended != autoencoder.attention_levels:
            found["ddconfig.attn_resolutions"] = tuple(
                resolution // 2**level for level in autoencoder.attention_levels
            )
    return found


def _conditioning(spec: ModelSpec) -> dict[str, Value]:
    """Return the weights' values of the entries under `cond_stage_config`, and of the key."""
    found: dict[str, Value] = {}
    if spec.task != "unconditional":
        found["conditioning_key"] = _conditioning_key(spec)
    if (classes := spec.find(ClassEmbedderSpec)) is not None:
        found["cond_stage_config.params.embed_dim"] = classes.width
    if (segmentation_encoder := spec.find(SegmentationEncoderSpec)) is not None:
        found["cond_stage_config.params.in_channels"] = segmentation_encoder.num_classes
        found["cond_stage_config.params.out_channels"] = segmentation_encoder.out_channels
    if (text := spec.find(TextEncoderSpec)) is not None and text.kind == "bert":
        found |= {
            "cond_stage_config.params.n_embed": text.width,
            "cond_stage_config.params.n_layer": text.num_layers,
            "cond_stage_config.params.vocab_size": text.vocab_size,
            "cond_stage_config.params.max_seq_len": text.max_tokens,
            "cond_stage_config.params.use_tokenizer": spec.task == "text-to-image",
        }
    return found


def _conditioning_key(spec: ModelSpec) -> str:
    assert spec.unet is not None  # called for models with a UNet only
    if spec.unet.context_dim is None:
        return "concat"
    key = "hybrid" if spec.unet.concat_channels else "crossattn"
    takes_vector = spec.unet.vector_dim is not None or spec.unet.num_classes is not None
    return f"{key}-adm" if takes_vector else key
