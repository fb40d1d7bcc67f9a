import contextlib
import hashlib
import io
import json
import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_runtime.adapters.files import read_adapter
from ldm_runtime.pipeline.live_adapters import origin_of
from tests.runtime.adapter_files import array, safetensors

#: Rank 1: up · down is [[3, 4], [6, 8]].
DOWN, UP = array([3, 4]), array([1], [2])
PRODUCT = array([3, 4], [6, 8])
WEIGHT = array([1, 0], [0, 1])
LAYER = "lora_unet_mid_block_attentions_0_proj_in"
NAME = ("unet", "mid_block_attentions_0_proj_in")


def layer_of(tensors, metadata=None):
    """The only layer of a file."""
    [layer] = read_adapter(safetensors(tensors, metadata)).layers.values()
    return layer


def kohya(**tensors):
    """The tensors of a layer under kohya's names."""
    return {f"{LAYER}.{name.replace('_weight', '.weight')}": each for name, each in tensors.items()}


def lora(**tensors):
    return kohya(lora_down_weight=DOWN, lora_up_weight=UP, **tensors)


def adapted(tensors, weight=WEIGHT, scale=1.0, metadata=None):
    return layer_of(tensors, metadata).adapted(weight, scale)


# --- spellings ------------------------------------------------------------------------------------

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TO_OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
Q_PROJ = "text_model.encoder.layers.0.self_attn.q_proj"
OUT_PROJ = "text_model.encoder.layers.0.self_attn.out_proj"
SGM = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
KOHYA = ("{}.lora_down.weight", "{}.lora_up.weight")
PEFT = ("{}.lora_A.weight", "{}.lora_B.weight")
SPELLINGS = [
    (KOHYA, f"lora_unet_{TO_Q.replace('.', '_')}", "unet", TO_Q),
    (KOHYA, f"lycoris_{TO_Q.replace('.', '_')}", "unet", TO_Q),
    (KOHYA, f"lora_unet_{SGM.replace('.', '_')}", "unet", SGM),
    (KOHYA, f"lora_te_{Q_PROJ.replace('.', '_')}", "text_encoder", Q_PROJ),
    (KOHYA, f"lora_te1_{Q_PROJ.replace('.', '_')}", "text_encoder", Q_PROJ),
    (KOHYA, f"lora_te2_{Q_PROJ.replace('.', '_')}", "text_encoder_2", Q_PROJ),
    (KOHYA, f"lycoris_{Q_PROJ.replace('.', '_')}", "text_encoder", Q_PROJ),
    (PEFT, f"unet.{TO_Q}", "unet", TO_Q),
    (PEFT, f"text_encoder.{Q_PROJ}", "text_encoder", Q_PROJ),
    (PEFT, f"text_encoder_2.{Q_PROJ}", "text_encoder_2", Q_PROJ),
    (PEFT, f"text_encoder.{Q_PROJ.removeprefix('text_model.')}", "text_encoder", Q_PROJ),
    (PEFT, f"base_model.model.{TO_Q}", "unet", TO_Q),
    (PEFT, f"base_model.model.{Q_PROJ}", "text_encoder", Q_PROJ),
    (PEFT, f"unet.base_model.model.{TO_Q}", "unet", TO_Q),
    (PEFT, f"diffusion_model.{SGM}", "unet", SGM),
    (PEFT, TO_Q, "unet", TO_Q),
    (("{}.lora_A.default.weight", "{}.lora_B.default.weight"), f"unet.{TO_Q}", "unet", TO_Q),
    (("{}.lora.down.weight", "{}.lora.up.weight"), f"unet.{TO_Q}", "unet", TO_Q),
    (
        ("{}_lora.down.weight", "{}_lora.up.weight"),
        f"unet.{TO_Q.replace('to_q', 'processor.to_q')}",
        "unet",
        TO_Q,
    ),
    (
        ("{}_lora.down.weight", "{}_lora.up.weight"),
        TO_OUT.replace("to_out.0", "processor.to_out"),
        "unet",
        TO_OUT,
    ),
    (
        ("{}.lora_linear_layer.down.weight", "{}.lora_linear_layer.up.weight"),
        f"text_encoder.{OUT_PROJ}",
        "text_encoder",
        OUT_PROJ,
    ),
    (
        ("{}_lora.down.weight", "{}_lora.up.weight"),
        f"text_encoder.{OUT_PROJ.replace('out_proj', 'to_out')}",
        "text_encoder",
        OUT_PROJ,
    ),
]


@pytest.mark.parametrize(("names", "layer", "component", "path"), SPELLINGS)
def test_every_spelling_of_a_layer_is_one_name(names, layer, component, path):
    down, up = (name.format(layer) for name in names)

    layers = read_adapter(safetensors({down: DOWN, up: UP})).layers

    assert list(layers) == [(component, path.replace(".", "_"))]
    np.testing.assert_array_equal(
        layers[component, path.replace(".", "_")].adapted(WEIGHT, 1.0), WEIGHT + PRODUCT
    )


def test_two_spellings_of_a_layer_are_an_error():
    tensors = lora() | {"unet.mid_block.attentions.0.proj_in.lora_A.weight": DOWN}

    with pytest.raises(ValueError, match=r"has both lora_unet_.* and unet\.mid_.*; delete one"):
        read_adapter(safetensors(tensors))


# --- kinds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "strength"), [(None, 1), (0.5, 0.5), (0, 1), (-2, -2)])
@pytest.mark.parametrize("scale", [0.0, 0.25, 1.0, -1.0])
def test_lora_adds_the_product_at_the_strength_of_alpha(alpha, strength, scale):
    tensors = lora() if alpha is None else lora(alpha=np.float32(alpha))

    result = adapted(tensors, scale=scale)

    np.testing.assert_allclose(result, WEIGHT + scale * strength * PRODUCT, rtol=1e-6)
    assert result.dtype == np.float32


def test_alpha_is_divided_by_the_rank():
    down, up = np.vstack([DOWN, DOWN]), np.hstack([UP, UP])

    result = adapted(kohya(lora_down_weight=down, lora_up_weight=up, alpha=np.int64(1)))

    np.testing.assert_array_equal(result, WEIGHT + PRODUCT)


def test_the_weight_itself_is_not_changed():
    weight = WEIGHT.copy()

    adapted(lora(), weight=weight)

    np.testing.assert_array_equal(weight, WEIGHT)


@pytest.mark.parametrize("factors", [2, 4])
@pytest.mark.parametrize("axes", [2, 4])
def test_matrices_fit_convolutions_of_one_pixel_and_the_reverse(factors, axes):
    tail = (1,) * (factors - 2)
    tensors = kohya(
        lora_down_weight=DOWN.reshape(1, 2, *tail), lora_up_weight=UP.reshape(2, 1, *tail)
    )

    result = adapted(tensors, weight=WEIGHT.reshape(2, 2, *(1,) * (axes - 2)))

    assert result.ndim == axes
    np.testing.assert_array_equal(result.reshape(2, 2), WEIGHT + PRODUCT)


def test_the_kernel_of_a_convolution_is_in_the_first_factor():
    down = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)
    tensors = kohya(lora_down_weight=down, lora_up_weight=UP.reshape(2, 1, 1, 1))

    result = adapted(tensors, weight=np.zeros((2, 1, 3, 3), np.float32))

    np.testing.assert_array_equal(result[0], down[0])
    np.testing.assert_array_equal(result[1], 2 * down[0])


def test_a_core_is_between_the_factors():
    core = array(1, 10).reshape(1, 1, 1, 2)
    tensors = kohya(
        lora_down_weight=DOWN.reshape(1, 2, 1, 1),
        lora_up_weight=UP.reshape(2, 1, 1, 1),
        lora_mid_weight=core,
    )

    result = adapted(tensors, weight=np.zeros((2, 2, 1, 2), np.float32))

    np.testing.assert_array_equal(result[:, :, 0, 0], PRODUCT)
    np.testing.assert_array_equal(result[:, :, 0, 1], 10 * PRODUCT)


def test_loha_is_the_product_by_elements():
    tensors = kohya(
        hada_w1_a=UP, hada_w1_b=DOWN, hada_w2_a=UP, hada_w2_b=DOWN, alpha=np.float32(0.5)
    )

    np.testing.assert_array_equal(adapted(tensors), WEIGHT + 0.5 * PRODUCT**2)


def test_lokr_is_the_product_of_kronecker_and_ignores_alpha_where_both_factors_are_full():
    tensors = kohya(lokr_w1=array([1, 2]), lokr_w2=array([1], [3]), alpha=np.float32(7))

    result = adapted(tensors, weight=np.zeros((2, 2), np.float32))

    np.testing.assert_array_equal(result, array([1, 2], [3, 6]))


def test_lokr_takes_the_strength_of_alpha_where_a_factor_has_a_rank():
    tensors = kohya(
        lokr_w1=array([1, 2]),
        lokr_w2_a=array([1], [3]),
        lokr_w2_b=array([1]),
        alpha=np.float32(2),
    )

    result = adapted(tensors, weight=np.zeros((2, 2), np.float32))

    np.testing.assert_array_equal(result, 2 * array([1, 2], [3, 6]))


def test_a_full_difference_is_added_to_weight_and_bias():
    layer = layer_of(kohya(diff=PRODUCT, diff_b=array(1, 2)))

    np.testing.assert_array_equal(layer.adapted(WEIGHT, 0.5), WEIGHT + 0.5 * PRODUCT)
    np.testing.assert_array_equal(layer.adapted_bias(array(1, 1), 0.5), [1.5, 2])
    assert (layer.changes_weight, layer.changes_bias) == (True, True)


def test_a_norm_has_differences_of_weight_and_bias():
    layer = layer_of(kohya(w_norm=array(1, 2), b_norm=array(3, 4)))

    np.testing.assert_array_equal(layer.adapted(array(1, 1), 1.0), [2, 3])
    np.testing.assert_array_equal(layer.adapted_bias(array(0, 0), 1.0), [3, 4])


def test_a_layer_may_change_a_bias_alone():
    layer = layer_of(kohya(diff_b=array(1, 2)))

    assert (layer.changes_weight, layer.changes_bias) == (False, True)
    assert layer.kind == "difference of a bias"
    with pytest.raises(ValueError, match="changes a bias alone"):
        layer.adapted(WEIGHT, 1.0)


def test_lora_changes_no_bias():
    layer = layer_of(lora())

    assert (layer.kind, layer.rank, layer.changes_bias) == ("LoRA", 1, False)
    with pytest.raises(ValueError, match="changes no bias"):
        layer.adapted_bias(array(1, 2), 1.0)


# --- DoRA -----------------------------------------------------------------------------------------

#: WEIGHT + PRODUCT is [[4, 4], [6, 9]]: norms of rows √32 and √117, of columns √52 and √97.
SUM = WEIGHT + PRODUCT


@pytest.mark.parametrize(
    ("magnitude", "norms"),
    [
        (array([1], [2]), np.sqrt([[32], [117]])),
        (array([1, 2]), np.sqrt([[52, 97]])),
    ],
)
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_dora_gives_outputs_or_inputs_their_magnitudes(magnitude, norms, scale):
    result = adapted(lora(dora_scale=magnitude), scale=scale)

    expected = WEIGHT + scale * (SUM * magnitude / norms - WEIGHT)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(2,), (1, 2, 1, 1), (2, 1)])
def test_magnitudes_of_peft_are_of_outputs_whatever_their_shape(shape):
    tensors = {
        "unet.conv_in.lora_A.weight": DOWN,
        "unet.conv_in.lora_B.weight": UP,
        "unet.conv_in.lora_magnitude_vector": array(1, 2).reshape(shape),
    }

    result = adapted(tensors)

    np.testing.assert_allclose(result, SUM * [[1], [2]] / np.sqrt([[32], [117]]), rtol=1e-6)
    assert layer_of(tensors).kind == "LoRA with DoRA"


# --- the header -----------------------------------------------------------------------------------


def header(**values):
    return {"lora_adapter_metadata": json.dumps(values)}


PEFT_NAMES = {
    "unet.mid_block.attentions.0.proj_in.lora_A.weight": np.repeat(DOWN, 4, axis=0),
    "unet.mid_block.attentions.0.proj_in.lora_B.weight": np.repeat(UP, 4, axis=1) / 4,
}


@pytest.mark.parametrize(
    ("values", "strength"),
    [
        ({}, 1),
        ({"unet.lora_alpha": 2}, 2 / 4),
        ({"unet.lora_alpha": 2, "unet.use_rslora": True}, 2 / math.sqrt(4)),
        ({"lora_alpha": 2, "use_rslora": False}, 2 / 4),
        ({"text_encoder.lora_alpha": 2}, 1),
        ({"unet.lora_alpha": 2, "unet.alpha_pattern": {"proj_in": 8}}, 8 / 4),
        ({"unet.lora_alpha": 2, "unet.alpha_pattern": {"attentions.0.proj_in": 8}}, 8 / 4),
        ({"unet.lora_alpha": 2, "unet.alpha_pattern": {"roj_in": 8}}, 2 / 4),
        ({"unet.lora_alpha": 2, "unet.alpha_pattern": {"^attentions.0.proj_in": 8}}, 2 / 4),
        (
            {"unet.lora_alpha": 2, "unet.alpha_pattern": {"^mid_block.attentions.0.proj_in": 8}},
            8 / 4,
        ),
        ({"unet.alpha": 3}, 3 / 4),
    ],
)
def test_alpha_of_peft_is_in_the_header(values, strength):
    result = adapted(PEFT_NAMES, metadata=header(**values))

    np.testing.assert_allclose(result, WEIGHT + strength * PRODUCT, rtol=1e-6)


def test_an_alpha_of_the_layer_comes_before_that_of_the_header():
    tensors = PEFT_NAMES | {"unet.mid_block.attentions.0.proj_in.alpha": np.float32(1)}

    result = adapted(tensors, metadata=header(**{"unet.lora_alpha": 2, "unet.use_rslora": True}))

    np.testing.assert_allclose(result, WEIGHT + PRODUCT / 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "has a lora_adapter_metadata that is not JSON"),
        ("[" * 100_000, "has a lora_adapter_metadata that is not JSON"),
        ("[]", "has a lora_adapter_metadata that is not a JSON object"),
        ('{"lora_alpha": "a"}', "has an alpha of 'a' for mid_block"),
        ('{"lora_alpha": NaN}', "has an alpha of 'nan' for mid_block"),
        ('{"lora_alpha": 1%s}' % ("0" * 400), "has an alpha of '10000"),
        ('{"alpha_pattern": {"(a+)+": 1}}', r"has a regular expression '\(a\+\)\+' in its alpha"),
        ('{"alpha_pattern": 3}', "has an alpha_pattern that is not a JSON object"),
    ],
)
def test_a_header_that_says_no_alpha_is_one_sentence(text, reason):
    with pytest.raises(ValueError, match=rf"^the data {reason}[^\n]*$"):
        read_adapter(safetensors(PEFT_NAMES, {"lora_adapter_metadata": text}))


# --- files ----------------------------------------------------------------------------------------


def test_a_file_has_a_name_a_digest_and_metadata(tmp_path):
    path = tmp_path / "style.safetensors"
    path.write_bytes(safetensors(lora(), {"ss_network_dim": "1"}))

    for given_path in (path, str(path)):
        adapter = read_adapter(given_path)

        assert adapter.name == str(path)
        assert adapter.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert adapter.metadata == {"ss_network_dim": "1"}
        assert adapter.layers[NAME].name == LAYER
        np.testing.assert_array_equal(adapter.layers[NAME].adapted(WEIGHT, 1.0), WEIGHT + PRODUCT)


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32", "F64"])
def test_all_types_of_floating_point_numbers_are_read(kind):
    # The upper half of a float32 is the bfloat16 of a small integer.
    convert = {
        "F16": lambda array: array.astype(np.float16),
        "BF16": lambda array: (array.view(np.uint32) >> 16).astype(np.uint16),
        "F32": lambda array: array,
        "F64": lambda array: array.astype(np.float64),
    }[kind]
    tensors = {name: convert(each) for name, each in lora(alpha=np.array([0.5], "f4")).items()}

    file = safetensors(tensors, types=dict.fromkeys(tensors, kind))

    np.testing.assert_array_equal(
        read_adapter(file).layers[NAME].adapted(WEIGHT, 1.0), WEIGHT + 0.5 * PRODUCT
    )


@pytest.mark.parametrize(
    ("file_name", "recorded"),
    [
        (b"style.safetensors", "style.safetensors"),
        (b"x" * 240 + b".safetensors", "x" * 240 + ".safetensors"),
        ("Größe.pt".encode(), "Größe.pt"),
        (b"st\xffyle.pt", "st\N{REPLACEMENT CHARACTER}yle.pt"),  # which JSON could not hold
    ],
)
def test_the_name_that_results_record_is_whole_wherever_the_file_lies(
    tmp_path, file_name, recorded
):
    path = tmp_path / ("folder" * 30) / ("deeper" * 30) / os.fsdecode(file_name)
    path.parent.mkdir(parents=True)
    path.write_bytes(safetensors(lora()))

    file = read_adapter(path)

    assert len(file.name) == 255
    assert file.file_name == origin_of(file, 1.0).name == recorded
    assert recorded.encode().decode() == recorded


def test_values_are_read_when_a_layer_is_applied(tmp_path):
    path = tmp_path / "style.safetensors"
    path.write_bytes(safetensors(lora()))
    layer = read_adapter(path).layers[NAME]

    with path.open("r+b") as file:  # the same bytes, mapped
        file.seek(-UP.nbytes, io.SEEK_END)
        file.write((2 * UP).tobytes())

    np.testing.assert_array_equal(layer.adapted(WEIGHT, 1.0), WEIGHT + 2 * PRODUCT)


CASES = {
    "empty": (b"", "is empty; get the file again"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "is neither a torch nor a safetensors file"),
    "cut off": (safetensors(lora())[:-4], "ends 4 bytes early"),
    "a checkpoint": (
        safetensors({"model.diffusion_model.out.2.weight": WEIGHT}),
        "is a model's own weights and not an adapter; export a checkpoint with `ldm-export`",
    ),
    "a UNet of diffusers": (
        safetensors({"down_blocks.0.resnets.0.conv1.weight": WEIGHT}),
        "is a model's own weights and not an adapter",
    ),
    "an embedding": (
        safetensors({"emb_params": WEIGHT}),
        r"is a textual inversion and not an adapter; give it as `textual_inversions`",
    ),
    "an embedding for SDXL": (
        safetensors({"clip_l": WEIGHT, "clip_g": WEIGHT}),
        r"is a textual inversion and not an adapter; give it as `textual_inversions`",
    ),
    "something else": (
        safetensors({"a": WEIGHT}),
        r"holds 1 tensors of 1 that are of no known kind of adapter \(a\)",
    ),
    "a misspelt name": (
        safetensors(lora() | {f"{LAYER}.lora_dwon.weight": DOWN}),
        rf"holds 1 tensors of 3 that are of no known kind of adapter \({LAYER}.lora_dwon.weight\)",
    ),
    "no up": (
        safetensors(kohya(lora_down_weight=DOWN)),
        f"is not a valid adapter: layer '{LAYER}' has lora_down without lora_up; get",
    ),
    "half of LoHa": (
        safetensors(kohya(hada_w1_a=UP, hada_w1_b=DOWN)),
        "has hada_w1_a and hada_w1_b without hada_w2_a and hada_w2_b; get",
    ),
    "alpha alone": (safetensors(kohya(alpha=np.float32(1))), "has alpha, which is not a known"),
    "two kinds": (safetensors(lora(diff=WEIGHT)), "lora_up, which is not a known kind of layer"),
    "two biases": (
        safetensors(lora(diff_b=array(1, 2), b_norm=array(1, 2))),
        "which is not a known kind of layer",
    ),
    "DoRA of a difference": (
        safetensors(kohya(diff=WEIGHT, dora_scale=UP)),
        "has diff and dora_scale, and DoRA is one magnitude on top of LoRA, LoHa or LoKr",
    ),
    "a rank of 0": (
        safetensors(
            kohya(
                lora_down_weight=np.zeros((0, 2), np.float32),
                lora_up_weight=np.zeros((2, 0), np.float32),
            )
        ),
        "has lora_down of shape 0x2, a rank of 0",
    ),
    "a number for a matrix": (
        safetensors(kohya(lora_down_weight=np.float32(1), lora_up_weight=UP)),
        "has lora_down that is a single number",
    ),
    "integers": (
        safetensors(kohya(lora_down_weight=DOWN.astype(np.int64), lora_up_weight=UP)),
        "has lora_down of type int64; save the adapter in float16, bfloat16 or float32",
    ),
    "two alphas": (
        safetensors(lora(alpha=array(1, 2))),
        "has an alpha of type float32 and shape 2 that is not one finite number",
    ),
    "an infinite alpha": (
        safetensors(lora(alpha=np.float32(np.inf))),
        r"has an alpha of type float32 and shape \(\) that is not one finite number",
    ),
}
UNSUPPORTED = {
    f"{LAYER}.on_input": "IA3",
    "base_model.model.conv_in.ia3_l": "IA3",
    f"{LAYER}.a1.weight": "GLoRA",
    f"{LAYER}.oft_blocks": "OFT or BOFT",
    "base_model.model.conv_in.oft_R.weight": "OFT or BOFT",
    "base_model.model.conv_in.boft_R": "OFT or BOFT",
    "lllite_unet_input_blocks_1_1.down.0.weight": "ControlLLLite",
    "lora_controlnet": "Control-LoRA",
    f"{LAYER}.set_weight": "replaced weights",
    "bundle_emb.cat.emb_params": "embeddings of words",
    "unet.conv_in.lora_B.bias": "LoRA with biases",
    "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": "a diffusion transformer",
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": "a diffusion transformer",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_k.lora_down.weight": "a diffusion transformer",
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_is_no_adapter_is_one_sentence(case):
    file, reason = CASES[case]

    with pytest.raises(ValueError, match=rf"^the data [^\n]*{reason}[^\n]*$"):
        read_adapter(file)


@pytest.mark.parametrize("tensor", UNSUPPORTED)
def test_kinds_that_are_not_read_are_refused_by_name(tensor):
    file = safetensors(lora() | {tensor: DOWN})

    with pytest.raises(ValueError, match=rf"holds [^(]*{UNSUPPORTED[tensor]} \(tensor '{tensor}'"):
        read_adapter(file)


@pytest.mark.parametrize("path", ["nowhere/style.safetensors", "a\0b", "."])
def test_a_path_that_cannot_be_read_is_one_sentence(path):
    with pytest.raises(ValueError, match=r"cannot be read: [^\n]+$"):
        read_adapter(path)


def test_what_is_neither_a_path_nor_bytes_is_one_sentence():
    with pytest.raises(ValueError, match="an adapter is a int; give a path or bytes of a file"):
        read_adapter(3)


def test_an_empty_file_is_one_sentence(tmp_path):
    path = tmp_path / "empty.safetensors"
    path.touch()

    with pytest.raises(ValueError, match=r"empty\.safetensors is empty; get the file again$"):
        read_adapter(path)


# --- weights that do not fit ----------------------------------------------------------------------

MISFITS = {
    "more inputs": (lora(), (2, 3), "lora_down 1x2, lora_up 2x1"),
    "a transposed weight": (
        kohya(lora_down_weight=np.ones((1, 3), "f4"), lora_up_weight=UP),
        (3, 2),
        "lora_down 1x3, lora_up 2x1",
    ),
    "a transposed weight with a core": (
        kohya(
            lora_down_weight=np.ones((1, 3), "f4"),
            lora_up_weight=UP,
            lora_mid_weight=np.ones((1, 1, 1, 1), "f4"),
        ),
        (3, 2),
        "lora_mid 1x1x1x1",
    ),
    "more outputs": (lora(), (3, 2), "lora_down 1x2, lora_up 2x1"),
    "a kernel": (lora(), (2, 2, 3, 3), "lora_down 1x2"),
    "a norm": (lora(), (2,), "lora_down 1x2"),
    "ranks": (kohya(lora_down_weight=np.ones((3, 2), "f4"), lora_up_weight=UP), (2, 2), "3x2"),
    "cores": (lora(lora_mid_weight=np.ones((2, 1, 1, 1), "f4")), (2, 2), "lora_mid 2x1x1x1"),
    "a transposed product": (
        kohya(lokr_w1=np.ones((1, 2), "f4"), lokr_w2=np.ones((1, 3), "f4")),
        (6, 1),
        "lokr_w1 1x2, lokr_w2 1x3",
    ),
    "a vast product": (
        kohya(lokr_w1=np.ones((1000, 1000), "f4"), lokr_w2=np.ones((1000, 1000), "f4")),
        (2, 2),
        "lokr_w1 1000x1000",
    ),
    "a cube": (
        kohya(lokr_w1=np.ones((1, 2, 1), "f4"), lokr_w2=np.ones((2, 1), "f4")),
        (2, 2),
        "lokr_w1 1x2x1",
    ),
    "a difference": (kohya(diff=DOWN), (2, 2), "diff 1x2"),
    "magnitudes": (lora(dora_scale=np.ones((3, 1), "f4")), (2, 2), "dora_scale 3x1"),
    "halves of LoHa": (
        kohya(hada_w1_a=UP, hada_w1_b=DOWN, hada_w2_a=UP[:1], hada_w2_b=DOWN),
        (2, 2),
        "hada_w2_a 1x1",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_weight_that_does_not_fit_is_one_sentence_with_both_shapes(case):
    tensors, shape, shapes = MISFITS[case]
    layer = layer_of(tensors)

    weight_shape = "x".join(map(str, shape))
    with pytest.raises(
        ValueError,
        match=rf"^layer '{LAYER}' \([^\n]*{shapes}[^\n]* does not fit a weight of shape "
        rf"{weight_shape}; give an adapter for this model$",
    ):
        layer.adapted(np.zeros(shape, np.float32), 1.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_numbers_that_are_not_finite_are_an_error(value):
    layer = layer_of(kohya(lora_down_weight=array([value, 1]), lora_up_weight=array([10], [1])))

    with pytest.raises(ValueError, match=rf"^layer '{LAYER}' makes numbers that are not finite;"):
        layer.adapted(WEIGHT, 1.0)


@pytest.mark.parametrize("value", [np.nan, 1e39])
def test_differences_of_biases_are_finite(value):
    layer = layer_of(kohya(diff_b=np.array([value, 0])))

    with pytest.raises(ValueError, match="not finite"):
        layer.adapted_bias(array(1, 2), 1.0)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("F8_E4M3", {0x38: 1.0, 0xC1: -2.25, 0x01: 2**-9, 0x7E: 448.0}),
        ("F8_E5M2", {0x3C: 1.0, 0xC1: -2.5, 0x01: 2**-16, 0x7B: 57344.0}),
    ],
)
def test_types_of_8_bits_are_read(kind, values):
    one = next(byte for byte, value in values.items() if value == 1)
    tensors = kohya(
        lora_down_weight=np.array([list(values)], np.uint8),
        lora_up_weight=np.array([[one]], np.uint8),
    )
    file = read_adapter(safetensors(tensors, types=dict.fromkeys(tensors, kind)))
    (layer,) = file.layers.values()

    adapted = layer.adapted(np.zeros((1, 4), np.float32), 1.0)

    assert adapted.tolist() == [list(values.values())]


# --- damaged files --------------------------------------------------------------------------------

_GOOD = safetensors(lora(alpha=np.float32(1), dora_scale=UP), header(lora_alpha=2))
_SHAPES = st.lists(st.integers(0, 3), max_size=5).map(tuple)
_PARTS = (
    *("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("diff", "diff_b", "w_norm", "b_norm", "lora_magnitude_vector"),
)
_SETS = (
    _PARTS[:2],
    _PARTS[:3],
    _PARTS[5:9],
    _PARTS[5:11],
    ("lokr_w1", "lokr_w2"),
    ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    ("diff", "diff_b"),
)


def use(file, shape=(2, 2)):
    """Read a file and apply its layers, or be told why not."""
    with contextlib.suppress(ValueError):
        for layer in read_adapter(file).layers.values():
            if layer.changes_weight:
                result = layer.adapted(np.ones(shape, np.float32), 0.5)
                assert result.shape == shape
                assert np.isfinite(result).all()


@given(position=st.integers(0, len(_GOOD) - 1), byte=st.integers(0, 255))
def test_a_damaged_byte_is_no_other_error(position, byte):
    use(_GOOD[:position] + bytes([byte]) + _GOOD[position + 1 :])


@given(st.binary(max_size=64), st.integers(0, len(_GOOD)))
def test_bytes_at_random_are_no_other_error(data, cut):
    use(data)
    use(_GOOD[:cut] + data)


@settings(max_examples=300)
@given(data=st.data(), shape=st.sampled_from([(2,), (2, 2), (3, 1), (2, 2, 1, 1), (2, 1, 3, 3)]))
def test_tensors_of_any_shapes_are_no_other_error(data, shape):
    names = data.draw(st.sampled_from(_SETS) | st.sets(st.sampled_from(_PARTS)).map(tuple))
    extra = data.draw(st.sets(st.sampled_from(["alpha", "dora_scale"])))
    values = st.sampled_from([0.0, 1.0, -2.5, 3e38, float("nan")])
    tensors = {
        f"{LAYER}.{name}": np.full(data.draw(_SHAPES), data.draw(values), np.float32)
        for name in {*names, *extra}
    }

    use(safetensors(tensors), shape)


# --- hashes ---------------------------------------------------------------------------------------


def kohyas_hash(data):
    """As `addnet_hash_safetensors` of kohya's sd-scripts and the web UI compute it."""
    stream = io.BytesIO(data)
    length = int.from_bytes(stream.read(8), "little")
    stream.seek(8 + length)
    return hashlib.sha256(stream.read()).hexdigest()


def test_the_web_uis_hash_is_of_what_follows_the_header():
    plain, named = (safetensors(lora(), metadata) for metadata in (None, {"title": "mine"}))

    files = [read_adapter(each) for each in (plain, named)]

    assert files[0].web_ui_sha256 == files[1].web_ui_sha256 == kohyas_hash(plain)
    assert files[0].sha256 != files[1].sha256


def test_the_web_uis_hash_is_what_the_metadata_says():
    stated = "ab" * 32

    assert read_adapter(safetensors(lora(), {"sshs_model_hash": stated})).web_ui_sha256 == stated
    wrong = safetensors(lora(), {"sshs_model_hash": "<b>"})
    assert read_adapter(wrong).web_ui_sha256 == kohyas_hash(wrong)
