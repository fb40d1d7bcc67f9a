"""The hyperparameters of a CLIP text transformer, read from its parameters' names and shapes."""

from dataclasses import dataclass

from ldm_export.errors import WeightsError
from ldm_export.weight_shapes import Shapes, indices, same, shape_of


@dataclass(frozen=True, kw_only=True)
class ClipShapes:
    """What the shapes of a CLIP text transformer tell.

    Attributes:
        width: Channels of a token.
        num_layers: Transformer layers.
        feed_forward_dim: Inner width of the feed-forward layers.
        vocab_size: Rows of the token embedding.
        max_tokens: Rows of the position embedding.
    """

    width: int
    num_layers: int
    feed_forward_dim: int
    vocab_size: int
    max_tokens: int


def read_clip(shapes: Shapes) -> ClipShapes:
    """Return what the parameters tell (names as in transformers, beginning with `text_model.`).

    Raises:
        WeightsError: A decisive tensor is missing, or the shapes contradict each other.
    """
    tokens, positions = (
        f"text_model.embeddings.{kind}_embedding.weight" for kind in ("token", "position")
    )
    vocab_size, width = shape_of(shapes, tokens, 2)
    max_tokens, position_width = shape_of(shapes, positions, 2)
    layers = indices(shapes, "text_model.encoder.layers")
    if not layers:
        raise WeightsError("the text encoder has no layer (text_model.encoder.layers.0.*)")
    widths = {f"the width of {tokens}": width, f"the width of {positions}": position_width}
    inner = {}
    for layer in layers:
        name = f"text_model.encoder.layers.{layer}.mlp.fc1.weight"
        inner[f"rows of {name}"], widths[f"columns of {name}"] = shape_of(shapes, name, 2)
    return ClipShapes(
        width=same(widths),
        num_layers=len(layers),
        feed_forward_dim=same(inner),
        vocab_size=vocab_size,
        max_tokens=max_tokens,
    )
