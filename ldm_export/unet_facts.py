"""The facts about a checkpoint that its UNet shows."""

from ldm_export.facts import ABSENT, NONE, Fact, difference, ending, present, size_of
from ldm_export.weight_shapes import Shapes

UNET_PREFIX = "model.diffusion_model."
VECTORS = (
    ("mlp", f"{UNET_PREFIX}label_emb.0.0.weight"),
    ("embedding", f"{UNET_PREFIX}label_emb.weight"),
)
#: Endings of UNet tensors that give the kind of attention away.
ATTENTIONS = (("transformer", ".attn1.to_q.weight"), ("qkv", ".qkv.weight"))


def unet_facts(unet: Shapes) -> dict[str, Fact]:
    """Return what the shapes of a UNet's tensors, by their names in the checkpoint, tell."""
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
        "vector": vector,
        "vector_width": size_of(unet, vector.tensor, axis=1),
    }


def _attention(unet: Shapes) -> Fact:
    for kind, suffix in ATTENTIONS:
        if tensor := ending(unet, suffix):
            return Fact(value=kind, tensor=tensor)
    return ABSENT


def _projection(unet: Shapes) -> Fact:
    kinds = {2: "linear", 4: "convolution"}
    for name in unet:
        # An AttentionBlock has a proj_out only, so proj_in is a transformer's.
        if name.endswith(".proj_in.weight"):
            return Fact(value=kinds.get(len(unet[name]), NONE), tensor=name)
    return ABSENT


def _time_embedding(unet: Shapes) -> Fact:
    tensor = f"{UNET_PREFIX}input_blocks.1.0.emb_layers.1.weight"
    rows = size_of(unet, tensor, axis=0)
    channels = size_of(unet, f"{UNET_PREFIX}input_blocks.1.0.out_layers.3.weight", axis=0)
    if not isinstance(rows.value, int) or not isinstance(channels.value, int):
        return ABSENT
    scales = rows.value == 2 * channels.value
    return Fact(value="scale and shift" if scales else "added", tensor=tensor)
