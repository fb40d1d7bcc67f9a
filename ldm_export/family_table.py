"""The table of checkpoint families: what each looks like, and what its shapes cannot tell.

A family that is exported is a row with `knowledge`; a row without is recognised by name, so that
its checkpoints get a clear refusal instead of a wrong export.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from ldm_runtime.manifest import PredictionType


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Which tensors of a checkpoint belong to a component, and what the network calls them.

    Attributes:
        component: Name in `components.COMPONENTS`.
        checkpoint_prefix: Beginning of the names in the checkpoint …
        parameter_prefix: … and what takes its place in the network's parameter names.
    """

    component: str
    checkpoint_prefix: str
    parameter_prefix: str


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What no shape tells about a family, from its released configurations and scripts.

    Attributes:
        task: What the model does with a request.
        num_heads: Attention heads of the UNet, or None if the head size is fixed.
        num_head_channels: Channels a head of the UNet, or None if the number is fixed.
        prediction_type: What the UNet was trained to output.
        latent_scale_factor: Multiplies the autoencoder's latents into the UNet's.
        linear_start: First beta of the schedule that is linear in sqrt(beta) …
        linear_end: … and the last, after …
        num_train_timesteps: … so many steps.
        text_head_channels: Channels a head of the text encoder.
        text_activation: Feed-forward activation of the text encoder.
        latent_size: Native height and width in latent pixels.
        sampler: Default sampler.
        num_inference_steps: Default number of steps.
        guidance_scale: Default guidance scale.
    """

    task: Literal["text-to-image"]
    num_heads: int | None
    num_head_channels: int | None
    prediction_type: PredictionType
    latent_scale_factor: float
    linear_start: float
    linear_end: float
    num_train_timesteps: int
    text_head_channels: int
    text_activation: Literal["quick_gelu", "gelu"]
    latent_size: int
    sampler: str
    num_inference_steps: int
    guidance_scale: float


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row: a checkpoint is of this family if it has all of its facts.

    Attributes:
        name: Recorded in the bundle.
        facts: Values of `fingerprint.fingerprint` that it must have. Of several rows that match,
            the one with the most facts is meant.
        knowledge: What no shape tells, or None if this version does not export the family.
        claims: Where its components' weights are.
    """

    name: str
    facts: Mapping[str, int | str]
    knowledge: Knowledge | None = None
    claims: tuple[Claim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """Tensors that no component needs: a regular expression over whole names, and why."""

    pattern: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A layout that is no whole LDM checkpoint: an expression found in a name, and what to do."""

    pattern: str
    advice: str


def _claim(component: str, checkpoint_prefix: str, parameter_prefix: str = "") -> Claim:
    return Claim(
        component=component,
        checkpoint_prefix=checkpoint_prefix,
        parameter_prefix=parameter_prefix,
    )


_UNET = (_claim("unet", "model.diffusion_model."),)
_KL_FIRST_STAGE = (
    _claim("vae_decoder", "first_stage_model.decoder.", "decoder."),
    _claim("vae_decoder", "first_stage_model.post_quant_conv.", "post_quant_conv."),
    _claim("vae_encoder", "first_stage_model.encoder.", "encoder."),
    _claim("vae_encoder", "first_stage_model.quant_conv.", "quant_conv."),
)
_CLIP = (
    _claim("text_encoder", "cond_stage_model.transformer.text_model.", "text_model."),
    # Written by transformers before 4.31, or by tools that copied its names of then.
    *(
        _claim("text_encoder", f"cond_stage_model.transformer.{part}.", f"text_model.{part}.")
        for part in ("embeddings", "encoder", "final_layer_norm")
    ),
)


def _recognised(name: str, **facts: int | str) -> Family:
    return Family(name=name, facts=MappingProxyType(facts))


def _ldm(name: str, channels: tuple[int, int, int], **facts: int | str) -> Family:
    """Return a row of the paper's models, by (model_channels, in_channels, out_channels)."""
    model_channels, in_channels, out_channels = channels
    return _recognised(
        name,
        model_channels=model_channels,
        in_channels=in_channels,
        out_channels=out_channels,
        **facts,
    )


_STABLE_DIFFUSION_1 = Family(
    name="stable-diffusion-1",
    facts=MappingProxyType(
        {
            "attention": "transformer",
            "projection": "convolution",
            "conditioning_channels": 0,
            "vector": "none",
            "first_stage": "kl",
            "text_encoder": "clip",
            "extra": "none",
        }
    ),
    knowledge=Knowledge(
        task="text-to-image",
        num_heads=8,
        num_head_channels=None,
        prediction_type="epsilon",
        latent_scale_factor=0.18215,
        linear_start=0.00085,
        linear_end=0.012,
        num_train_timesteps=1000,
        text_head_channels=64,
        text_activation="quick_gelu",
        latent_size=64,
        sampler="ddim",
        # 16 are as good as many in docs/quality.md; half as many again, for richer pictures.
        num_inference_steps=25,
        guidance_scale=7.5,
    ),
    claims=_UNET + _KL_FIRST_STAGE + _CLIP,
)

#: Sources: the released configurations of CompVis/latent-diffusion (a506df5),
#: CompVis/stable-diffusion (21f890f9), Stability-AI/stablediffusion (cf1d67a) and
#: Stability-AI/generative-models (0ad7de9).
FAMILIES: tuple[Family, ...] = (
    _STABLE_DIFFUSION_1,
    _recognised(
        "stable-diffusion-1-inpainting",
        projection="convolution",
        conditioning_channels=5,
        first_stage="kl",
        text_encoder="clip",
    ),
    _recognised(
        "instruct-pix2pix",
        projection="convolution",
        conditioning_channels=4,
        first_stage="kl",
        text_encoder="clip",
    ),
    _recognised(
        "stable-diffusion-2",
        projection="linear",
        conditioning_channels=0,
        vector="none",
        text_encoder="openclip",
    ),
    _recognised(
        "stable-diffusion-2 in sgm format",
        projection="linear",
        conditioning_channels=0,
        vector="none",
        text_encoder="openclip (sgm)",
    ),
    _recognised(
        "stable-diffusion-2-inpainting",
        projection="linear",
        conditioning_channels=5,
        text_encoder="openclip",
    ),
    _recognised(
        "stable-diffusion-2-depth",
        projection="linear",
        conditioning_channels=1,
        text_encoder="openclip",
    ),
    _recognised(
        "stable-diffusion-x4-upscaler",
        projection="linear",
        conditioning_channels=3,
        vector="embedding",
        text_encoder="openclip",
    ),
    _recognised(
        "stable-diffusion-2-unclip-h", projection="linear", vector="mlp", vector_width=2048
    ),
    _recognised(
        "stable-diffusion-2-unclip-l", projection="linear", vector="mlp", vector_width=1536
    ),
    _recognised(
        "stable-diffusion-xl",
        projection="linear",
        conditioning_channels=0,
        text_encoder="clip + openclip",
    ),
    _recognised(
        "stable-diffusion-xl-inpainting",
        projection="linear",
        conditioning_channels=5,
        text_encoder="clip + openclip",
    ),
    _recognised(
        "stable-diffusion-xl-refiner", projection="linear", vector="mlp", vector_width=2560
    ),
    _ldm("ldm-celeba256, ldm-ffhq256 or ldm-lsun-beds256", (224, 3, 3), attention="qkv"),
    _ldm("ldm-lsun-churches256", (192, 4, 4), attention="qkv"),
    _ldm("ldm-cin256", (256, 4, 4), context_dim=512, attention="transformer"),
    _ldm("ldm-cin256-v2", (192, 3, 3), context_dim=512, attention="transformer"),
    _ldm("ldm-text2img256", (192, 3, 3), context_dim=640, attention="transformer"),
    _ldm("ldm-txt2img-1p4b", (320, 4, 4), context_dim=1280, text_encoder="bert"),
    _ldm("ldm-layout2img-openimages256", (128, 3, 3), context_dim=512, attention="transformer"),
    _ldm("ldm-bsr-sr", (160, 6, 3), attention="qkv"),
    _ldm("ldm-inpainting-big", (256, 7, 3), attention="qkv"),
    _ldm("ldm-semantic-synthesis256 or -512", (128, 6, 3), attention="qkv"),
    _ldm("ldm-retrieval-augmented-768", (448, 16, 16), context_dim=768),
    # What is left of a kind, whatever its size.
    _recognised("a latent diffusion model with a VQ first stage", first_stage="vq"),
    _recognised("a class-conditional latent diffusion model", text_encoder="class embedding"),
    _recognised("a latent diffusion model with label embeddings", vector="embedding"),
    _recognised("a latent diffusion model with vector conditioning", vector="mlp"),
    _recognised("a latent diffusion model with a BERT text encoder", text_encoder="bert"),
)

_SCHEDULE_BUFFERS = (
    "betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod|"
    "log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod|"
    "posterior_variance|posterior_log_variance_clipped|posterior_mean_coef1|posterior_mean_coef2"
)

LEFTOVERS: tuple[Leftover, ...] = (
    Leftover(pattern=_SCHEDULE_BUFFERS, reason="noise schedule, recorded in the bundle"),
    Leftover(
        pattern="ddim_(sigmas|alphas|alphas_prev|sqrt_one_minus_alphas)",
        reason="left behind by a sampler",
    ),
    Leftover(pattern="scale_factor", reason="latent scale factor, recorded in the bundle"),
    Leftover(pattern="logvar", reason="used in training only"),
    Leftover(pattern=r"(first_stage_model\.)?loss\..*", reason="used in training only"),
    Leftover(pattern=r"model_ema\.(decay|num_updates)", reason="state of the moving average"),
    Leftover(pattern=r"model_ema\..*", reason="moving average, not used"),
    Leftover(pattern=r".*\.position_ids", reason="the numbers 0, 1, 2, …"),
    Leftover(
        pattern=r"cond_stage_model\.(transformer\.)?(logit_scale|text_projection(\.weight)?)",
        reason="for comparing text with images only",
    ),
)

FOREIGN: tuple[Foreign, ...] = (
    Foreign(
        pattern=r"(^|\.)time_embedding\.cond_proj\.weight$",
        advice="it is a latent consistency model in the layout of diffusers, which this version "
        "does not export",
    ),
    Foreign(
        pattern=r"lora_(down|up|A|B)\b|^lora_",
        advice="it is a LoRA, a change to a model and no model; merge it into its base checkpoint",
    ),
    Foreign(
        pattern=r"(^|\.)(down_blocks|up_blocks)\.\d",
        advice="it has the layout of diffusers (down_blocks, up_blocks); use the single-file "
        "checkpoint of the same model, or convert it to the original layout",
    ),
    Foreign(
        pattern=r"(^|\.)(joint_blocks|double_blocks|transformer_blocks\.0\.norm1_context)\.",
        advice="it is a diffusion transformer, not a UNet; only UNets are exported",
    ),
    Foreign(
        pattern=r"^(control_model\.|input_hint_block\.|controlnet_)",
        advice="it is or contains a ControlNet, which this version does not export",
    ),
    Foreign(
        pattern=r"^(string_to_param|emb_params)",
        advice="it is a textual inversion embedding and no model",
    ),
    Foreign(
        pattern=r"^(diffusion_model\.)?input_blocks\.0\.0\.weight$",
        advice="it is a UNet only; a whole checkpoint also holds first_stage_model.* and "
        "cond_stage_model.*",
    ),
    Foreign(
        pattern=r"^quantize\.embedding\.weight$",
        advice="it is a VQ first stage only; a whole checkpoint also holds model.diffusion_model.*",
    ),
    Foreign(
        pattern=r"^(encoder|decoder)\.conv_in\.weight$",
        advice="it is a first stage (VAE) only; a whole checkpoint also holds "
        "model.diffusion_model.* and cond_stage_model.*",
    ),
    Foreign(
        pattern=r"^text_model\.",
        advice="it is a text encoder only; a whole checkpoint also holds model.diffusion_model.* "
        "and first_stage_model.*",
    ),
)
