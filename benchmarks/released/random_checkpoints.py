"""Checkpoints of released sizes with random weights, in CompVis's layout."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from ldm_export.families.records import DEPTH_ESTIMATOR
from ldm_export.networks.loading import build_network
from ldm_runtime.specs.model import ModelSpec, SamplingDefaults, components_of
from ldm_runtime.specs.networks import AutoencoderSpec, TextEncoderSpec
from released.records import ReleasedModel

#: Size of the layers that training starts at zero, against the others: small, but there.
_LATE_GAIN = 0.5
_LATE = re.compile(
    r"out_layers\.3|proj_out|\.out\.2|to_out|net\.2|conv2|out_proj|fc2|emb_layers\.1"
)
_TIMESTEPS = 1000


def as_spec(model: ReleasedModel) -> ModelSpec:
    """Return the specification of a model's checkpoint, with neutral sampling defaults."""
    has_unet = "unet" in model.networks
    alphas = _alphas(model).float().tolist() if has_unet else ()
    side = 64 * model.networks.of(AutoencoderSpec).factor
    return ModelSpec(
        family=model.name,
        task=model.task,
        weights="model",
        alphas_cumprod=tuple(alphas),
        edm=None,
        prediction_type="epsilon",
        null_prompt="encoded",
        noise_augmentation=None,
        scales_image=False,
        defaults=SamplingDefaults(
            height=side,
            width=side,
            sampler="ddim",
            schedule=None,
            num_inference_steps=4,
            guidance_scale=1.0,
            eta=0.0,
        ),
        label_names=(),
        assumptions=(),
        networks=model.networks,
    )


def write_checkpoint(path: Path, model: ReleasedModel) -> None:
    """Write a checkpoint as PyTorch Lightning did; the noise schedule is fp32 in any case."""
    random = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    if "unet" in model.networks:
        state.update(_schedule_buffers(model))
    for name, shape in parameter_shapes(model):
        value = _random_weight(name, shape, random)
        state[name] = value.half() if model.half else value
    encoder = model.networks.find(TextEncoderSpec)
    if encoder is not None and encoder.kind == "clip":
        positions = torch.arange(encoder.max_tokens)[None]
        prefix = model.prefixes.get("text_encoder", "cond_stage_model.transformer.")
        state[f"{prefix}text_model.embeddings.position_ids"] = positions
    torch.save({"state_dict": state, "global_step": 0, "epoch": 0}, path)


def parameter_shapes(model: ReleasedModel) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of a checkpoint's weights, with those that nothing uses."""
    spec = as_spec(model)
    for component in components_of(spec):
        for name, parameter in build_network(component, spec).named_parameters():
            yield _stored_name(component, name, model, spec), tuple(parameter.shape)
    encoder = spec.find(TextEncoderSpec)
    if encoder is not None and encoder.kind == "bert":
        yield from _unused_head(encoder)
    yield from model.unused.items()


def _stored_name(component: str, name: str, model: ReleasedModel, spec: ModelSpec) -> str:
    """Return what a checkpoint calls a network's parameter."""
    if component == "depth_estimator":
        row = next(each for each in DEPTH_ESTIMATOR if name.startswith(each.parameter_prefix))
        return row.checkpoint_prefix + name.removeprefix(row.parameter_prefix)
    return (model.prefixes.get(component) or _prefix(component, spec)) + name


def _prefix(component: str, spec: ModelSpec) -> str:
    """Return the prefix of a network's parameter names in a checkpoint."""
    if component == "unet":
        return "model.diffusion_model."
    if component.startswith("vae_"):
        return "" if spec.unet is None else "first_stage_model."
    encoder = spec.find(TextEncoderSpec)
    is_clip = encoder is not None and encoder.kind == "clip"
    return "cond_stage_model.transformer." if is_clip else "cond_stage_model."


def _unused_head(spec: TextEncoderSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the layer that once predicted tokens and that every released file still has."""
    yield "cond_stage_model.transformer.to_logits.weight", (spec.vocab_size, spec.width)
    yield "cond_stage_model.transformer.to_logits.bias", (spec.vocab_size,)


def _random_weight(name: str, shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    """Return values that keep activations near one through all layers, and no layer at zero."""
    value: torch.Tensor = torch.randn(shape, generator=random)
    if not shape:  # the scale of CLIP's comparisons
        return value
    if len(shape) == 1:  # biases, and gains of normalisations
        return 0.1 * value + (1.0 if name.endswith("weight") else 0.0)
    if "embedding" in name or "_emb" in name:
        return 0.5 * value
    spread: float = (_LATE_GAIN if _LATE.search(name) else 1.0) / math.sqrt(value[0].numel())
    return value * spread


def _alphas(model: ReleasedModel) -> torch.Tensor:
    ends = math.sqrt(model.linear_start), math.sqrt(model.linear_end)
    betas = torch.linspace(*ends, _TIMESTEPS, dtype=torch.float64).square()
    return torch.cumprod(1 - betas, 0)


def _schedule_buffers(model: ReleasedModel) -> dict[str, torch.Tensor]:
    """Return the schedule as CompVis' code stores it, or as sgm does in files of its layout."""
    alphas = _alphas(model)
    if any(prefix.startswith("conditioner.") for prefix in model.prefixes.values()):
        return {"denoiser.sigmas": (1 / alphas - 1).sqrt().float()}
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    betas = 1 - alphas / before
    buffers = {
        "betas": betas,
        "alphas_cumprod": alphas,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": alphas.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alphas).log(),
        "sqrt_recip_alphas_cumprod": alphas.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alphas - 1).sqrt(),
        "posterior_variance": betas * (1 - before) / (1 - alphas),
    }
    if model.scale_by_std:
        buffers["scale_factor"] = torch.tensor(
            model.networks.of(AutoencoderSpec).latent_scale_factor
        )
    return {name: values.float() for name, values in buffers.items()}
