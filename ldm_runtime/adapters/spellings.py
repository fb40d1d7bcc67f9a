"""The names of tensors in adapter files, in every spelling that trainers use.

kohya and LyCORIS join a module's path with "_", which no splitting undoes; PEFT and diffusers keep
the dots. So a layer is named here by its component and its path joined with "_".

Sources: `networks/lora.py` of kohya-ss/sd-scripts, `lycoris/kohya.py` of LyCORIS 4.1,
`utils/state_dict_utils.py` of diffusers 0.42.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

LayerName = tuple[str, str]

#: Names of a layer's tensors, and the names that they have here.
_TENSORS: Mapping[str, str] = MappingProxyType(
    {
        "lora_down.weight": "lora_down",
        "lora_up.weight": "lora_up",
        "lora_mid.weight": "lora_mid",
        "lora_A.weight": "lora_down",
        "lora_B.weight": "lora_up",
        "lora.down.weight": "lora_down",
        "lora.up.weight": "lora_up",
        "lora_linear_layer.down.weight": "lora_down",
        "lora_linear_layer.up.weight": "lora_up",
        "lora_magnitude_vector": "lora_magnitude_vector",
        "lora_magnitude_vector.weight": "lora_magnitude_vector",
        **{
            name: name
            for name in (
                *("alpha", "dora_scale", "diff", "diff_b", "w_norm", "b_norm"),
                *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
                *("lokr_w1", "lokr_w1_a", "lokr_w1_b"),
                *("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
            )
        },
    }
)
#: The name of PEFT's adapter, which it leaves out when it saves.
_DEFAULT = re.compile(r"\.default(?:_\d+)?(?=\.weight$|$)")
_KEY = re.compile(rf"(.+?)(?:\.|_(?=lora\.))({'|'.join(map(re.escape, _TENSORS))})")
#: What wrappers of a whole model put before every name.
_WRAPPERS = ("base_model.model.", "lycoris_")
_COMPONENTS: Mapping[str, str] = MappingProxyType(
    {
        "lora_unet_": "unet",
        "lora_te1_": "text_encoder",
        "lora_te2_": "text_encoder_2",
        "lora_te_": "text_encoder",
        "unet.": "unet",
        "text_encoder.": "text_encoder",
        "text_encoder_2.": "text_encoder_2",
        "diffusion_model.": "unet",
        "model.diffusion_model.": "unet",
    }
)
_TEXT_MODEL = "text_model_"
#: Beginnings of a text encoder's layers in transformers 5, which leaves out "text_model.".
_INSIDE_TEXT_MODEL = ("encoder_layers_", "embeddings_", "final_layer_norm")
_OLD_PROJECTION = re.compile(r"_self_attn_to_(q|k|v|out)$")

#: Kinds of adapters that are not read, by a part of the names of their tensors.
_UNSUPPORTED: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        "IA3": re.compile(r"\.on_input$|\.ia3_l$"),
        "GLoRA": re.compile(r"\.[ab][12m]\.weight$"),
        "OFT or BOFT": re.compile(r"[._]b?oft_\w+(\.weight)?$"),
        "ControlLLLite": re.compile(r"^lllite_"),
        "Control-LoRA": re.compile(r"^lora_controlnet$"),
        "replaced weights": re.compile(r"\.(set_weight|reshape_weight)$|\.modules_to_save\."),
        "embeddings of words": re.compile(r"^bundle_emb\.|\.lora_embedding_[AB]"),
        "LoRA with biases": re.compile(r"\.lora_(B|up)\.(default\.)?bias$"),
        "an adapter of a diffusion transformer": re.compile(
            r"^(lora_|lycoris_)?transformer[._](?!resblocks)|^lora_te3_"
            r"|[._](double|single|joint)_blocks[._]"
        ),
    }
)
_EMBEDDING = re.compile(r"emb_params|clip_[lg]|text_encoders_\d")
_CHECKPOINT = re.compile(
    r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner|down_blocks"
    r"|text_model|decoder|encoder)\."
)


@dataclass(frozen=True, kw_only=True)
class Spelled:
    """The name of a tensor, understood.

    Attributes:
        layer: The component, and the layer's path joined with "_".
        path: The layer's path in the spelling of the file, without the component.
        shown: The layer's name in the file.
        tensor: The tensor's name within the layer, such as "lora_down".
    """

    layer: LayerName
    path: str
    shown: str
    tensor: str


def understood(key: str) -> Spelled | None:
    """Return what the name of a tensor says, or None if it is not of a known kind of layer."""
    match = _KEY.fullmatch(_DEFAULT.sub("", key))
    if match is None:
        return None
    component, path = _component(match[1])
    return Spelled(
        layer=(component, _joined(component, path)),
        path=path,
        shown=match[1],
        tensor=_TENSORS[match[2]],
    )


def unsupported(keys: Iterable[str]) -> tuple[str, str] | None:
    """Return the first name of a kind of adapter that is not read, and that kind."""
    return next(
        (
            (key, kind)
            for key in keys
            for kind, pattern in _UNSUPPORTED.items()
            if pattern.search(key)
        ),
        None,
    )


def is_checkpoint(keys: Iterable[str]) -> bool:
    """Return whether names, none of which is understood, are those of a model's own weights."""
    return any(_CHECKPOINT.match(key) for key in keys)


def is_textual_inversion(keys: Iterable[str]) -> bool:
    """Return whether names, none of which is understood, are those of learned words."""
    return all(_EMBEDDING.fullmatch(key) for key in keys)


def _component(name: str) -> tuple[str, str]:
    """Return the component of a layer, and its path there."""
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    for prefix, component in _COMPONENTS.items():
        if name.startswith(prefix):
            return component, name.removeprefix(prefix).removeprefix(_WRAPPERS[0])
    return ("text_encoder" if name.startswith("text_model") else "unet"), name


def _joined(component: str, path: str) -> str:
    """Return a path joined with "_", as diffusers and transformers name the module today."""
    name = path.replace(".", "_")
    if component == "unet":
        name = name.replace("_processor_", "_")
        return f"{name}_0" if name.endswith("_to_out") else name
    if name.startswith(_INSIDE_TEXT_MODEL):
        name = _TEXT_MODEL + name
    return _OLD_PROJECTION.sub(r"_self_attn_\1_proj", name)
