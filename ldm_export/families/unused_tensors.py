"""Tensors that no component needs, and formats that are not supported, as rows."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class IgnoredTensor:
    """Tensors that no component needs: a regular expression over whole names, and the reason."""

    pattern: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class UnsupportedFormat:
    """A format that is not a whole LDM checkpoint: an expression found in a name, and advice."""

    pattern: str
    advice: str


FOR_COMPARING = "for comparing text with images only"

_SCHEDULE_BUFFERS = (
    "betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod|"
    "log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod|"
    "posterior_variance|posterior_log_variance_clipped|posterior_mean_coef1|posterior_mean_coef2|"
    r"denoiser\.sigmas"
)

IGNORED_TENSORS: tuple[IgnoredTensor, ...] = (
    IgnoredTensor(pattern=_SCHEDULE_BUFFERS, reason="noise schedule, recorded in the bundle"),
    IgnoredTensor(
        pattern="ddim_(sigmas(_for_original_num_steps)?|alphas|alphas_prev|sqrt_one_minus_alphas)",
        reason="buffers of a sampler",
    ),
    IgnoredTensor(pattern="scale_factor", reason="latent scale factor, recorded in the bundle"),
    IgnoredTensor(pattern="logvar|lvlb_weights", reason="used in training only"),
    IgnoredTensor(
        pattern=r"((first_stage|cond_stage)_model\.)?loss\..*", reason="used in training only"
    ),
    IgnoredTensor(pattern=r"model_ema\.(decay|num_updates)", reason="state of the moving average"),
    IgnoredTensor(pattern=r"model_ema\..*", reason="moving average, not used"),
    IgnoredTensor(
        pattern=r"first_stage_model\.model_ema\..*",
        reason="moving average of the autoencoder, which no model samples with",
    ),
    IgnoredTensor(
        pattern=r"embedding_manager\..*", reason="embeddings of a textual inversion, not applied"
    ),
    IgnoredTensor(pattern=r"lora_te_text_model.*", reason="a LoRA, not applied"),
    IgnoredTensor(pattern=r"safety_checker\..*", reason="a classifier of images, not exported"),
    IgnoredTensor(pattern="v_pred", reason="a mark of the prediction type, recorded in the bundle"),
    IgnoredTensor(pattern="ztsnr", reason="a mark of the noise schedule, recorded in the bundle"),
    IgnoredTensor(pattern=r".*\.position_ids", reason="the numbers 0, 1, 2, …"),
    IgnoredTensor(
        # ComfyUI's saves have had them, of SDXL's first encoder too.
        pattern=r"(cond_stage_model|conditioner\.embedders\.0)\.(transformer\.)?"
        r"(logit_scale|text_projection(\.weight)?)",
        reason=FOR_COMPARING,
    ),
    IgnoredTensor(
        pattern=r"(cond_stage_model|conditioner\.embedders\.[0-9])\.model\.logit_scale",
        reason=FOR_COMPARING,
    ),
    IgnoredTensor(
        pattern=r"cond_stage_model\.transformer\.to_logits\.(weight|bias)",
        reason="for predicting words only",
    ),
)

UNSUPPORTED_FORMATS: tuple[UnsupportedFormat, ...] = (
    UnsupportedFormat(
        pattern=r"lora_(down|up|A|B)\b|^lora_",
        advice="it is a LoRA, a change to a model, not a model; merge it into its base checkpoint",
    ),
    UnsupportedFormat(
        pattern=r"(^|\.)(down_blocks|up_blocks)\.\d",
        advice="it has the layout of diffusers (down_blocks, up_blocks); give the folder that it "
        "is from, with its model_index.json, or, with a UNet, the rest by --vae and --text-encoder",
    ),
    UnsupportedFormat(
        pattern=r"(^|\.)(joint_blocks|double_blocks|transformer_blocks\.0\.norm1_context)\.",
        advice="it is a diffusion transformer, not a UNet; only UNets are exported",
    ),
    UnsupportedFormat(
        pattern=r"^(control_model\.|input_hint_block\.|controlnet_)",
        advice="it is or contains a ControlNet, which this version does not export",
    ),
    UnsupportedFormat(
        pattern=r"^(string_to_param|emb_params|<[^.]*>$)",
        advice="it is a textual inversion embedding and not a model",
    ),
    UnsupportedFormat(
        pattern=r"^(diffusion_model\.)?input_blocks\.0\.0\.weight$",
        advice="it is a UNet only; a whole checkpoint also holds first_stage_model.* and what "
        "conditions the UNet, cond_stage_model.*; give them by --vae and --text-encoder, and the "
        "second text encoder of SDXL by --text-encoder-2",
    ),
    UnsupportedFormat(
        pattern=r"^(encoder|decoder)\.conv_in\.weight$",
        advice="it is a part of an autoencoder (VAE) only; a whole one holds encoder.*, "
        "quant_conv.*, post_quant_conv.* and decoder.*",
    ),
    UnsupportedFormat(
        pattern=r"^text_model\.",
        advice="it is a text encoder only; a whole checkpoint also holds model.diffusion_model.* "
        "and first_stage_model.*",
    ),
)
