"""diffusers' `LDMBertModel` for an encoder of words or layouts in the CompVis layout."""

from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)

_NAMES = {
    "transformer.token_emb": "model.embed_tokens",
    "transformer.pos_emb.emb": "model.embed_positions",
    "transformer.norm": "model.layer_norm",
}
_LAYER = (
    {
        "0": "self_attn_layer_norm",
        "1.to_q": "self_attn.q_proj",
        "1.to_k": "self_attn.k_proj",
        "1.to_v": "self_attn.v_proj",
        "1.to_out": "self_attn.out_proj",
    },
    {"0": "final_layer_norm", "1.net.0.0": "fc1", "1.net.2": "fc2"},
)


def load_bert(spec, state):
    """Return the twin for an encoder's state dict; its unused logits stay as they were made."""
    config = LDMBertConfig(
        vocab_size=spec.vocab_size,
        max_position_embeddings=spec.max_tokens,
        encoder_layers=spec.num_layers,
        encoder_ffn_dim=spec.feed_forward_dim,
        encoder_attention_heads=spec.num_heads,
        head_dim=64,
        d_model=spec.width,
    )
    twin = LDMBertModel(config)
    renamed = {_renamed(name): value for name, value in state.items()}
    missing, left_over = twin.load_state_dict(renamed, strict=False)
    assert left_over == []
    assert all(name.startswith("to_logits") for name in missing)
    return twin.eval().requires_grad_(False)


def _renamed(name):
    layer, kind = name.rsplit(".", 1)
    if layer in _NAMES:
        return f"{_NAMES[layer]}.{kind}"
    number, rest = layer.removeprefix("transformer.attn_layers.layers.").split(".", 1)
    index, half = divmod(int(number), 2)
    return f"model.layers.{index}.{_LAYER[half][rest]}.{kind}"
