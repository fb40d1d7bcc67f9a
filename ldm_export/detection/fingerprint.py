"""The features that tell families of checkpoints apart, each with the tensor that shows it."""

import re
from collections.abc import Iterable, Mapping

from ldm_export.detection.features import (
    ABSENT,
    NONE,
    Feature,
    Tensors,
    difference,
    ending,
    present,
    size_of,
)
from ldm_export.hyperparameters.shapes import Shapes
from ldm_runtime.specs.model import PredictionType

_BERT = "cond_stage_model.transformer."
_AUTOENCODER_PREFIXES = ("first_stage_model.", "")
_ATTENTION = "decoder.mid.attn_1."  # spelled in several ways from there on
_WORDPIECES = 30522  # rows of BERT's uncased vocabulary

#: Tensors that identify a kind of autoencoder or conditioner; the first that is present decides.
AUTOENCODERS = tuple(
    (kind, f"{prefix}{tensor}")
    for prefix in _AUTOENCODER_PREFIXES
    for kind, tensor in (("vq", "quantize.embedding.weight"), ("kl", "post_quant_conv.weight"))
)
CONDITIONERS = (
    ("clip", "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"),
    ("clip", "cond_stage_model.transformer.embeddings.token_embedding.weight"),
    ("openclip", "cond_stage_model.model.ln_final.weight"),
    ("bert", f"{_BERT}token_emb.weight"),
    ("class embedding", "cond_stage_model.embedding.weight"),
    ("segmentation encoder", "cond_stage_model.channel_mapper.weight"),
    ("autoencoder", "cond_stage_model.encoder.conv_in.weight"),
    (
        "clip + openclip",
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
    ),
    ("openclip (sgm)", "conditioner.embedders.0.model.ln_final.weight"),
)
#: Tensors that mark a model of EDM, by what it predicts.
EDM = (("epsilon", "edm_mean"), ("v_prediction", "edm_vpred.sigma_max"))
EXTRAS = (
    ("depth estimator", "depth_model."),
    ("image embedder", "embedder.model."),
    ("low-resolution image", "low_scale_model."),
    ("control network", "control_model."),
    ("layout of diffusers", "encoder.down_blocks."),
    ("layout of diffusers", "decoder.up_blocks."),
)


def fingerprint(
    tensors: Tensors,
    *,
    takes_embeddings: bool = False,
    edm_prediction: PredictionType | None = None,
) -> Mapping[str, Feature]:
    """Return the features of a checkpoint by name: those that its names and shapes show.

    Two may be shown by other files: that the configuration says that the model takes embeddings,
    and that the scheduler says that it is of EDM.

    Args:
        tensors: The checkpoint's.
        takes_embeddings: Whether the configuration says so.
        edm_prediction: Prediction type of a model of EDM whose scheduler says so.
    """
    unet = {name: tensors[name].shape for name in tensors if name.startswith(UNET_PREFIX)}
    rest = {name: tensors[name].shape for name in tensors if name not in unet}
    stated = Feature(value="embeddings", tensor="") if takes_embeddings else ABSENT
    shown = unet_features(unet) | _autoencoder_features(rest) | _conditioner_features(unet, rest)
    edm = present(rest, EDM) if edm_prediction is None else Feature(value=edm_prediction, tensor="")
    return shown | {"stated_condition": stated, "edm": edm}


def _autoencoder_features(tensors: Shapes) -> dict[str, Feature]:
    kind = present(tensors, AUTOENCODERS)
    found = (prefix for prefix in _AUTOENCODER_PREFIXES if kind.tensor.startswith(prefix))
    prefix = next(found, "")
    codebook = "quantize.embedding.weight"
    return {
        "autoencoder": kind,
        "autoencoder_channels": size_of(tensors, f"{prefix}encoder.conv_in.weight", axis=0),
        "factor": _factor(tensors, prefix),
        "latent_channels": size_of(tensors, f"{prefix}post_quant_conv.weight", axis=1),
        "codebook_size": size_of(tensors, f"{prefix}{codebook}", axis=0),
        "middle_attention": _middle_attention(tensors, prefix),
    }


def _conditioner_features(unet: Shapes, rest: Shapes) -> dict[str, Feature]:
    return {
        "concat": _concat(unet, rest),
        "conditioner": present(rest, CONDITIONERS),
        "classes": size_of(rest, "cond_stage_model.embedding.weight", axis=0),
        "tokens": _tokens(rest),
        "extra": _extra(rest),
    }


def prefixes(names: Iterable[str]) -> Mapping[str, int]:
    """Return how many of `names` match "first part.*", or are it, the most frequent first."""
    counts: dict[str, int] = {}
    for name in names:
        first, dot, _ = name.partition(".")
        prefix = f"{first}.*" if dot else name
        counts[prefix] = counts.get(prefix, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def expected_tensor(feature: str, value: int | str) -> str:
    """Return the tensor that would show that `feature` is `value`, or "" if no single one would."""
    tables = {
        "autoencoder": AUTOENCODERS,
        "conditioner": CONDITIONERS,
        "vector": VECTORS,
        "edm": EDM,
    }
    return next((tensor for kind, tensor in tables.get(feature, ()) if kind == value), "")


def _extra(tensors: Shapes) -> Feature:
    for kind, prefix in EXTRAS:
        tensor = next((name for name in tensors if name.startswith(prefix)), "")
        if tensor:
            return Feature(value=kind, tensor=tensor)
    return ABSENT


def _factor(tensors: Shapes, prefix: str) -> Feature:
    """Return the downsampling factor: pixels per latent pixel in each direction."""
    pattern = re.compile(rf"{re.escape(prefix)}decoder\.up\.([0-9]{{1,2}})\.")
    levels = {int(match[1]): name for name in tensors if (match := pattern.match(name))}
    if not levels:
        return ABSENT
    return Feature(value=2 ** max(levels), tensor=levels[max(levels)])


def _middle_attention(tensors: Shapes, prefix: str) -> Feature:
    if f"{prefix}decoder.mid.block_1.conv1.weight" not in tensors:
        return ABSENT
    attention = next((name for name in tensors if name.startswith(f"{prefix}{_ATTENTION}")), "")
    return Feature(value="yes" if attention else "no", tensor=attention)


def _concat(unet: Shapes, rest: Shapes) -> Feature:
    """Return what the UNet's extra input channels may be, compared with its autoencoder's."""
    tensor = f"{UNET_PREFIX}input_blocks.0.0.weight"
    extra = difference(
        size_of(unet, tensor, axis=1), size_of(unet, f"{UNET_PREFIX}out.2.weight", axis=0)
    )
    if extra.value in (NONE, 0):
        return ABSENT
    latents = size_of(rest, "first_stage_model.post_quant_conv.weight", axis=1).value
    kinds = {
        "image": size_of(rest, "first_stage_model.encoder.conv_in.weight", axis=1).value,
        "masked latents": latents + 1 if isinstance(latents, int) else NONE,
    }
    fitting = [kind for kind, channels in kinds.items() if channels == extra.value]
    return Feature(value=" or ".join(fitting) or "something else", tensor=tensor)


def _tokens(tensors: Shapes) -> Feature:
    """Return what a BERT encoder reads: words, or three tokens per object and two of the crop."""
    tensor = f"{_BERT}token_emb.weight"
    vocabulary = size_of(tensors, tensor, axis=0)
    length = size_of(tensors, f"{_BERT}pos_emb.emb.weight", axis=0)
    if not isinstance(vocabulary.value, int):
        return vocabulary
    if vocabulary.value == _WORDPIECES:
        return Feature(value="words", tensor=tensor)
    is_layout = isinstance(length.value, int) and length.value > 2 and length.value % 3 == 2
    return Feature(value="layout" if is_layout else "something else", tensor=tensor)


UNET_PREFIX = "model.diffusion_model."
VECTORS = (
    ("mlp", f"{UNET_PREFIX}label_emb.0.0.weight"),
    ("embedding", f"{UNET_PREFIX}label_emb.weight"),
)
#: Endings of UNet tensors that identify the kind of attention.
ATTENTIONS = (("transformer", ".attn1.to_q.weight"), ("qkv", ".qkv.weight"))


def unet_features(unet: Shapes) -> dict[str, Feature]:
    """Return the features that the shapes of a UNet's tensors, by checkpoint name, show."""
    middle = f"{UNET_PREFIX}middle_block.0.out_layers.3.weight"
    in_channels = size_of(unet, f"{UNET_PREFIX}input_blocks.0.0.weight", axis=1)
    out_channels = size_of(unet, f"{UNET_PREFIX}out.2.weight", axis=0)
    vector = present(unet, VECTORS)
    return {
        "model_channels": size_of(unet, f"{UNET_PREFIX}input_blocks.0.0.weight", axis=0),
        "in_channels": in_channels,
        "out_channels": out_channels,
        "middle_channels": size_of(unet, middle, axis=0),
        "conditioning_channels": difference(in_channels, out_channels),
        "context_dim": size_of(unet, ending(unet, ".attn2.to_k.weight"), axis=1),
        "attention": _attention(unet),
        "projection": _projection(unet),
        "time_embedding": _time_embedding(unet),
        "guidance": present(unet, [("embedded", f"{UNET_PREFIX}time_embedding.cond_proj.weight")]),
        "input_depths": _depths(unet, "input_blocks"),
        "middle": _middle(unet),
        "output_depths": _depths(unet, "output_blocks"),
        "vector": vector,
        "vector_width": size_of(unet, vector.tensor, axis=1),
    }


def _attention(unet: Shapes) -> Feature:
    for kind, suffix in ATTENTIONS:
        if tensor := ending(unet, suffix):
            return Feature(value=kind, tensor=tensor)
    return ABSENT


def _projection(unet: Shapes) -> Feature:
    kinds = {2: "linear", 4: "convolution"}
    for name in unet:
        # An AttentionBlock has a proj_out only, so proj_in is a transformer's.
        if name.endswith(".proj_in.weight"):
            return Feature(value=kinds.get(len(unet[name]), NONE), tensor=name)
    return ABSENT


def _depths(unet: Shapes, half: str) -> Feature:
    """Return the transformer depth after every residual block of a half, such as "0 2 10"."""
    pattern = re.compile(
        rf"{re.escape(UNET_PREFIX + half)}\.([0-9]{{1,3}})\."
        r"(?:0\.in_layers\.2|1\.transformer_blocks\.[0-9]{1,3}\.(norm1))\.weight"
    )
    depths: dict[int, int] = {}
    shown = ""
    for name in unet:
        if match := pattern.fullmatch(name):
            depths[int(match[1])] = depths.get(int(match[1]), 0) + (match[2] is not None)
            shown = shown or name
    value = " ".join(str(depths[block]) for block in sorted(depths))
    return Feature(value=value, tensor=shown) if any(depths.values()) else ABSENT


def _middle(unet: Shapes) -> Feature:
    """Return the contents of the middle block; attention has a residual block on either side."""
    kinds = (
        ("attention", "1.proj_out.weight"),
        ("residual blocks", "2.out_layers.3.weight"),
        ("residual block", "0.out_layers.3.weight"),
    )
    return present(unet, [(kind, f"{UNET_PREFIX}middle_block.{part}") for kind, part in kinds])


def _time_embedding(unet: Shapes) -> Feature:
    tensor = f"{UNET_PREFIX}input_blocks.1.0.emb_layers.1.weight"
    rows = size_of(unet, tensor, axis=0)
    channels = size_of(unet, f"{UNET_PREFIX}input_blocks.1.0.out_layers.3.weight", axis=0)
    if not isinstance(rows.value, int) or not isinstance(channels.value, int):
        return ABSENT
    scales = rows.value == 2 * channels.value
    return Feature(value="scale and shift" if scales else "added", tensor=tensor)
