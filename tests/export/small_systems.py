"""Small models of every task in the CompVis layout with random weights, for tests.

Every layer is random, also those that training starts at zero: a fresh UNet returns zeros, and
every comparison of zeros succeeds. Each state has what shapes of released checkpoints have and no
network needs: schedule buffers, strays of samplers, and weights that only training used.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm_export.networks.loading import build_network
from ldm_runtime.specs.components import NETWORK_RECORDS
from ldm_runtime.specs.model import ModelSpec, SamplingDefaults, components_of
from ldm_runtime.specs.networks import (
    ClassEmbedderSpec,
    Networks,
    SegmentationEncoderSpec,
)
from ldm_runtime.testing import autoencoder_spec, text_encoder_spec, unet_spec

#: What the weights cannot tell; give it as `height` and `width`.
SIZE = 64

_QKV = unet_spec(
    in_channels=3,
    out_channels=3,
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention="qkv",
    transformer_depth=(0, 1),
    num_heads=None,
    num_head_channels=32,
    context_dim=None,
)
_CROSS = replace(_QKV, attention="transformer", context_dim=48)
_EIGHT_HEADS = replace(_QKV, num_heads=8, num_head_channels=None)
_VQ = autoencoder_spec(
    kind="vq",
    channels=32,
    channel_mult=(1, 1, 2),
    num_res_blocks=1,
    z_channels=3,
    embed_dim=3,
    codebook_size=600,  # more than are compared at a time
    latent_scale_factor=1.0,
)
_KL = replace(_VQ, kind="kl", z_channels=4, embed_dim=4, codebook_size=None)
_WORDS = text_encoder_spec(
    kind="bert",
    width=48,
    num_layers=2,
    num_heads=2,
    feed_forward_dim=96,
    vocab_size=30522,
    activation="gelu",
    pad_token_id=0,
)
_LAYOUT = replace(_WORDS, vocab_size=400, max_tokens=3 * 6 + 2, pad_token_id=399)
_PLAIN = ModelSpec(
    family="ldm-unconditional",
    task="unconditional",
    weights="model",
    alphas_cumprod=(),
    edm=None,
    prediction_type="epsilon",
    null_prompt="encoded",
    noise_augmentation=None,
    scales_image=False,
    defaults=SamplingDefaults(
        height=SIZE,
        width=SIZE,
        sampler="ddim",
        schedule=None,
        num_inference_steps=50,
        guidance_scale=1.0,
        eta=1.0,
    ),
    label_names=(),
    assumptions=(),
    networks=Networks(unet=_QKV, autoencoder=_VQ),
)


def _spec(steps: int, guidance_scale: float, eta: float, **fields: object) -> ModelSpec:
    defaults = replace(
        _PLAIN.defaults, num_inference_steps=steps, guidance_scale=guidance_scale, eta=eta
    )
    networks = {name: fields.pop(name) for name in NETWORK_RECORDS if name in fields}
    return replace(_PLAIN.with_networks(**networks), defaults=defaults, **fields)


#: What each is, without detecting it; the noise schedule is added when one is made.
_SPECS: Mapping[str, ModelSpec] = {
    "unconditional": _PLAIN,
    "churches": replace(
        _PLAIN.with_networks(
            unet=replace(
                _EIGHT_HEADS,
                in_channels=4,
                out_channels=4,
                num_res_blocks=2,
                transformer_depth=(1, 0),
                scale_shift_norm=True,
                resblock_updown=True,
            ),
            autoencoder=replace(_KL, latent_scale_factor=0.75),
        ),
        family="ldm-unconditional-scale-shift",
    ),
    "class-to-image": _spec(
        200,
        1.0,
        1.0,
        family="ldm-class",
        task="class-to-image",
        unet=replace(_CROSS, in_channels=4, out_channels=4, transformer_depth=(1, 1)),
        autoencoder=replace(_VQ, attention_levels=(2,), z_channels=4, embed_dim=4),
        class_embedder=ClassEmbedderSpec(num_classes=7, width=48, null_class=None),
    ),
    "class-guided": _spec(
        20,
        3.0,
        0.0,
        family="ldm-class-imagenet-guided",
        task="class-to-image",
        unet=replace(_CROSS, num_heads=1, num_head_channels=None),
        class_embedder=ClassEmbedderSpec(num_classes=1001, width=48, null_class=1000),
    ),
    "text-to-image": _spec(
        50,
        5.0,
        0.0,
        family="ldm-text-kl",
        task="text-to-image",
        unet=replace(_CROSS, in_channels=4, out_channels=4, num_heads=8, num_head_channels=None),
        autoencoder=replace(_KL, latent_scale_factor=0.18215),
        text_encoder=_WORDS,
    ),
    "text-vq": _spec(
        100,
        1.0,
        0.0,
        family="ldm-text-vq",
        task="text-to-image",
        unet=_CROSS,
        text_encoder=_WORDS,
    ),
    "layout-to-image": _spec(
        200,
        1.0,
        0.0,
        family="ldm-layout",
        task="layout-to-image",
        unet=replace(_CROSS, transformer_depth=(0, 2), middle_depth=2),
        text_encoder=_LAYOUT,
    ),
    "semantic-synthesis": _spec(
        200,
        1.0,
        1.0,
        family="ldm-semantic-synthesis",
        task="semantic-synthesis",
        unet=replace(_EIGHT_HEADS, in_channels=6, transformer_depth=(0, 0)),
        segmentation_encoder=SegmentationEncoderSpec(
            num_classes=5, out_channels=3, num_downsampling_steps=2
        ),
    ),
    "super-resolution": _spec(
        100,
        1.0,
        1.0,
        family="ldm-super-resolution",
        task="super-resolution",
        unet=replace(_QKV, in_channels=6),
    ),
    "inpainting": _spec(
        50,
        1.0,
        0.0,
        family="ldm-inpainting",
        task="inpainting",
        unet=replace(_EIGHT_HEADS, in_channels=7, resblock_updown=True),
        autoencoder=replace(_VQ, middle_attention=False),
    ),
    "retrieval": _spec(
        50,
        5.0,
        0.0,
        family="ldm-retrieval",
        task="retrieval",
        # Few channels would be those of a model that lost its conditioner.
        unet=replace(_CROSS, in_channels=5, out_channels=5),
        autoencoder=replace(_KL, z_channels=5, embed_dim=5),
    ),
    "autoencoder": _spec(1, 1.0, 0.0, family="autoencoder-vq", task="autoencoder", unet=None),
    "autoencoder-kl": _spec(
        1, 1.0, 0.0, family="autoencoder-kl", task="autoencoder", unet=None, autoencoder=_KL
    ),
}
#: First and last beta of the released model of each kind; others have .0015 and .0195.
_BETAS: Mapping[str, tuple[float, float]] = {
    "churches": (0.0015, 0.0155),
    "text-to-image": (0.00085, 0.012),
    "layout-to-image": (0.0015, 0.0205),
    "semantic-synthesis": (0.0015, 0.0205),
    "super-resolution": (0.0015, 0.0155),
    "inpainting": (0.0015, 0.0205),
    "retrieval": (0.0015, 0.015),
}
#: Every task, and "churches" (KL, scale-shift), "class-guided" (one head, a null class), "text-vq"
#: and "autoencoder-kl" besides.
SMALL_SYSTEMS = tuple(_SPECS)


@dataclass(frozen=True, kw_only=True)
class SmallSystem:
    """A checkpoint in memory.

    Attributes:
        state: Its tensors by their names in a CompVis checkpoint.
        spec: What it is, at `SIZE` and without assumptions.
    """

    state: dict[str, Tensor]
    spec: ModelSpec


def small_system(name: str, seed: int = 0) -> SmallSystem:
    """Return one of `SMALL_SYSTEMS`; the same seed gives the same weights."""
    generator = torch.Generator().manual_seed(seed)
    spec, state = _SPECS[name], {}
    if spec.unet is not None:
        buffers = _schedule(*_BETAS.get(name, (0.0015, 0.0195)))
        spec = replace(spec, alphas_cumprod=tuple(buffers["alphas_cumprod"].tolist()))
        state |= buffers
    autoencoder = "first_stage_model." if spec.unet is not None else ""
    prefixes = {
        "unet": "model.diffusion_model.",
        "vae_encoder": autoencoder,
        "vae_decoder": autoencoder,
    }
    for component in components_of(spec):
        prefix = prefixes.get(component, "cond_stage_model.")
        for parameter, tensor in _random(component, spec, generator).items():
            state[prefix + parameter] = tensor
    return SmallSystem(state=state | _unneeded(name, state), spec=spec)


def _random(component: str, spec: ModelSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """Return weights with which outputs are neither zero nor large."""
    weights = {}
    for name, parameter in build_network(component, spec).state_dict().items():
        tensor = torch.empty(parameter.shape)
        if tensor.ndim > 1:
            is_table = name.removesuffix(".weight").endswith(("embedding", "emb"))
            spread = 0.5 if is_table else tensor[0].numel() ** -0.5
            tensor.normal_(std=spread, generator=generator)
        else:
            center = 1.0 if name.endswith("weight") else 0.0
            tensor.normal_(mean=center, std=0.1, generator=generator)
        weights[name] = tensor
    return weights


def _schedule(start: float, end: float) -> dict[str, Tensor]:
    betas = torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64).square()
    alphas = torch.cumprod(1 - betas, 0)
    return {
        "betas": betas.float(),
        "alphas_cumprod": alphas.float(),
        "sqrt_alphas_cumprod": alphas.sqrt().float(),
    }


def _unneeded(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what checkpoints of this kind have besides their networks."""
    strays = {"ddim_alphas": torch.ones(200), "ddim_sigmas": torch.zeros(200)}
    match name:
        case "churches":
            return {"scale_factor": torch.tensor(0.75)}
        case "text-to-image" | "text-vq" | "layout-to-image":
            tokens = state["cond_stage_model.transformer.token_emb.weight"]
            logits = "cond_stage_model.transformer.to_logits"
            return {f"{logits}.weight": tokens.clone(), f"{logits}.bias": tokens[:, 0].clone()}
        case "super-resolution":
            return strays
        case "inpainting":
            autoencoder = "first_stage_model."
            copies = {
                key.replace(autoencoder, "cond_stage_model."): tensor
                for key, tensor in state.items()
                if key.startswith(autoencoder)
            }
            return strays | copies
        case "autoencoder" | "autoencoder-kl":
            return {
                "loss.logvar": torch.zeros(()),
                "loss.discriminator.main.0.weight": torch.zeros(8, 3, 4, 4),
            }
        case _:
            return {}
