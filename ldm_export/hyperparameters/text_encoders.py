"""Hyperparameters of text encoders read from shapes: CLIP, OpenCLIP, latent diffusion's BERT."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from ldm_export.errors import WeightsError
from ldm_export.hyperparameters.shapes import Shapes, indices, same, shape_of
from ldm_runtime.specs.networks import TextEncoderSpec

_HEAD_CHANNELS = 64
_STACK = "transformer.attn_layers.layers"
#: Layers of OpenCLIP's text encoders in released models, ViT-H/14's and ViT-bigG/14's, by width
#: (`model_configs` of mlfoundations/open_clip, 89fb801).
OPENCLIP_LAYERS: Mapping[int, int] = MappingProxyType({1024: 24, 1280: 32})


def read_bert(shapes: Shapes, *, pad_token_id: int | None) -> TextEncoderSpec:
    """Return the record of a BERT encoder from its parameter names (beginning `transformer.`).

    Heads have 64 channels whatever the width, so the rows of a query projection count them
    (ldm/modules/x_transformer.py of CompVis/latent-diffusion, a506df5).

    Args:
        shapes: Shape of every parameter.
        pad_token_id: Token that short prompts are padded with; None is the last token.

    Raises:
        WeightsError: A decisive tensor is missing, or the shapes contradict each other.
    """
    tokens, positions = "transformer.token_emb.weight", "transformer.pos_emb.emb.weight"
    vocab_size, width = shape_of(shapes, tokens, 2)
    max_tokens, position_width = shape_of(shapes, positions, 2)
    widths = {f"the width of {tokens}": width, f"the width of {positions}": position_width}
    inner, feed_forward = {}, {}
    for layer in range(_num_layers(shapes)):
        queries = f"{_STACK}.{2 * layer}.1.to_q.weight"
        linear = f"{_STACK}.{2 * layer + 1}.1.net.0.0.weight"
        inner[f"rows of {queries}"], widths[f"columns of {queries}"] = shape_of(shapes, queries, 2)
        rows, widths[f"columns of {linear}"] = shape_of(shapes, linear, 2)
        feed_forward[f"rows of {linear}"] = rows
    return TextEncoderSpec(
        kind="bert",
        width=same(widths),
        num_layers=len(inner),
        context_layers=len(inner),
        final_norm=True,
        pooled_dim=None,
        num_heads=_num_heads(same(inner)),
        feed_forward_dim=same(feed_forward),
        vocab_size=vocab_size,
        max_tokens=max_tokens,
        activation="gelu",
        pad_token_id=vocab_size - 1 if pad_token_id is None else pad_token_id,
    )


def _num_layers(shapes: Shapes) -> int:
    """Return the number of layers; each is attention and feed-forward, numbered separately."""
    halves = len(indices(shapes, _STACK))
    if halves % 2 or not halves:
        raise WeightsError(
            f"the text encoder has {halves} members of {_STACK}; attention and feed-forward in "
            "turn, an even number, were expected"
        )
    return halves // 2


def _num_heads(inner: int) -> int:
    if inner % _HEAD_CHANNELS:
        raise WeightsError(
            f"{_STACK}.0.1.to_q.weight has {inner} rows; a multiple of {_HEAD_CHANNELS}, the "
            "channels of a head, was expected"
        )
    return inner // _HEAD_CHANNELS


@dataclass(frozen=True, kw_only=True)
class ClipShapes:
    """The hyperparameters of a CLIP text transformer that shapes tell.

    Attributes:
        width: Channels per token.
        num_layers: Transformer layers.
        feed_forward_dim: Inner width of the feed-forward layers.
        vocab_size: Rows of the token embedding.
        max_tokens: Rows of the position embedding.
        projected_dim: Columns of the projection of the pooled output, or None without one.
    """

    width: int
    num_layers: int
    feed_forward_dim: int
    vocab_size: int
    max_tokens: int
    projected_dim: int | None = None


@dataclass(frozen=True, kw_only=True)
class _ClipNames:
    tokens: str
    positions: str
    layers: str
    feed_forward: str


_TRANSFORMERS = _ClipNames(
    tokens="text_model.embeddings.token_embedding.weight",
    positions="text_model.embeddings.position_embedding.weight",
    layers="text_model.encoder.layers",
    feed_forward="mlp.fc1.weight",
)
_OPENCLIP = _ClipNames(
    tokens="token_embedding.weight",
    positions="positional_embedding",
    layers="transformer.resblocks",
    feed_forward="mlp.c_fc.weight",
)
_PROJECTION = "text_projection"


def read_clip(shapes: Shapes) -> ClipShapes:
    """Return what shapes tell (parameter names as in transformers, beginning `text_model.`).

    Raises:
        WeightsError: A decisive tensor is missing, or the shapes contradict each other.
    """
    return _read(shapes, _TRANSFORMERS)


def read_openclip(shapes: Shapes) -> ClipShapes:
    """Return what shapes tell (parameter names as in open_clip's text tower).

    Raises:
        WeightsError: A decisive tensor is missing, or the shapes contradict each other.
    """
    found = _read(shapes, _OPENCLIP)
    if _PROJECTION not in shapes:
        return found
    rows, columns = shape_of(shapes, _PROJECTION, 2)
    same({f"the width of {_OPENCLIP.tokens}": found.width, f"rows of {_PROJECTION}": rows})
    return replace(found, projected_dim=columns)


def _read(shapes: Shapes, names: _ClipNames) -> ClipShapes:
    vocab_size, width = shape_of(shapes, names.tokens, 2)
    max_tokens, position_width = shape_of(shapes, names.positions, 2)
    layers = indices(shapes, names.layers)
    if not layers:
        raise WeightsError(f"the text encoder has no layer ({names.layers}.0.*)")
    widths = {f"the width of {names.tokens}": width}
    widths[f"the width of {names.positions}"] = position_width
    inner = {}
    for layer in layers:
        name = f"{names.layers}.{layer}.{names.feed_forward}"
        inner[f"rows of {name}"], widths[f"columns of {name}"] = shape_of(shapes, name, 2)
    return ClipShapes(
        width=same(widths),
        num_layers=len(layers),
        feed_forward_dim=same(inner),
        vocab_size=vocab_size,
        max_tokens=max_tokens,
    )
