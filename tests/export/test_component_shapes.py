"""Shapes of one component that no network of the latent-diffusion paper has are errors."""

from dataclasses import replace

import pytest

from ldm_export.errors import WeightsError
from ldm_export.hyperparameters.autoencoder import read_autoencoder
from ldm_export.hyperparameters.conditioners import read_channel_mapper, read_class_embedding
from ldm_export.hyperparameters.text_encoders import read_bert
from ldm_export.hyperparameters.unet import read_unet
from tests.export.ldm_layouts import CELEBA, CHURCHES, CIN256, INPAINTING, LAYOUT2IMG, SEMANTIC
from tests.export.sd_layout import TINY, autoencoder_shapes, bert_shapes, unet_shapes

SMALL = replace(CHURCHES, model_channels=32, channel_mult=(1, 1, 2), depth=(1, 1, 0))


def unet(shapes, num_heads=8):
    return read_unet(shapes, num_heads=num_heads, num_head_channels=None)


def autoencoder(shapes):
    return read_autoencoder(shapes, latent_scale_factor=1.0)


@pytest.mark.parametrize("num_res_blocks", [1, 2, 3])
@pytest.mark.parametrize("channel_mult", [(1,), (1, 1), (1, 2, 2), (1, 1, 1, 1)])
def test_levels_are_found_where_residual_blocks_change_the_resolution(channel_mult, num_res_blocks):
    depth = tuple(int(level % 2 == 0) for level in range(len(channel_mult)))
    layout = replace(SMALL, channel_mult=channel_mult, num_res_blocks=num_res_blocks, depth=depth)

    spec = unet(unet_shapes(layout))

    assert spec.channel_mult == channel_mult
    assert spec.num_res_blocks == num_res_blocks
    assert spec.transformer_depth == depth
    assert spec.resblock_updown == (len(channel_mult) > 1)


def test_a_residual_block_that_halves_with_attention_behind_it_is_an_error():
    shapes = unet_shapes(SMALL)
    shapes["input_blocks.3.1.qkv.weight"] = (96, 32, 1)

    with pytest.raises(WeightsError, match=r"no attention there is \(32, 0\), .* is \(32, 1\)"):
        unet(shapes)


def test_input_blocks_that_the_levels_cannot_share_are_an_error():
    shapes = unet_shapes(SMALL)
    shapes["input_blocks.9.0.out_layers.3.weight"] = (64, 64, 3, 3)

    with pytest.raises(WeightsError, match="10 input blocks, which its 3 levels"):
        unet(shapes)


def test_two_kinds_of_attention_are_an_error():
    shapes = unet_shapes(SMALL) | {
        "middle_block.1.transformer_blocks.0.attn1.to_q.weight": (64, 64)
    }

    with pytest.raises(WeightsError, match=r"two kinds of attention"):
        unet(shapes)


@pytest.mark.parametrize(
    ("name", "message"), [(".qkv.", "has no attention"), ("middle_block.1.", "in its middle")]
)
def test_a_unet_without_attention_is_an_error(name, message):
    shapes = {key: shape for key, shape in unet_shapes(SMALL).items() if name not in key}

    with pytest.raises(WeightsError, match=message):
        unet(shapes)


def test_a_time_embedding_that_neither_adds_nor_scales_is_an_error():
    shapes = unet_shapes(SMALL)
    for name in shapes:
        if name.endswith("emb_layers.1.weight"):
            shapes[name] = (shapes[name][0] // 2 * 3, shapes[name][1])

    with pytest.raises(WeightsError, match=r"is 3; it is 1 where .* 2 where it scales"):
        unet(shapes)


def test_heads_must_divide_the_channels_of_qkv_attention():
    with pytest.raises(
        WeightsError, match=r"5 attention heads do not divide the 32 channels .*qkv"
    ):
        unet(unet_shapes(SMALL), num_heads=5)


def test_attention_in_the_middle_alone_is_read():
    spec = unet(unet_shapes(SEMANTIC))

    assert (spec.transformer_depth, spec.middle_depth, spec.attention) == ((0, 0, 0), 1, "qkv")


def test_a_codebook_of_another_width_is_an_error():
    shapes = autoencoder_shapes(CELEBA) | {"quantize.embedding.weight": (8192, 4)}

    with pytest.raises(
        WeightsError, match=r"post_quant_conv.* is 3, but columns of quantize.* is 4"
    ):
        autoencoder(shapes)


def test_an_encoder_with_moments_does_not_go_with_a_codebook():
    shapes = autoencoder_shapes(CELEBA) | {"quant_conv.weight": (6, 6, 1, 1)}

    with pytest.raises(WeightsError, match=r"quant_conv.* begins with \(6, 6\), but a VQ auto"):
        autoencoder(shapes)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_attention_in_the_middle_of_one_half_only_is_an_error(side):
    shapes = autoencoder_shapes(INPAINTING) | {f"{side}.mid.attn_1.q.weight": (512, 512, 1, 1)}

    with pytest.raises(WeightsError, match=r"presence of decoder\.mid\.attn_1"):
        autoencoder(shapes)


def test_attention_on_a_level_of_one_half_only_is_an_error():
    shapes = autoencoder_shapes(CIN256)
    shapes = {name: shapes[name] for name in shapes if "encoder.down.3.attn" not in name}

    with pytest.raises(WeightsError, match=r"decoder\.up is \(3,\), but .* encoder\.down is \(\)"):
        autoencoder(shapes)


STACK = "transformer.attn_layers.layers"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (f"{STACK}.0.1.to_q.weight", (500, 512), "500"),
        (f"{STACK}.4.1.to_q.weight", (512, 640), r"layers\.4\.1\.to_q\.weight is 640"),
        (f"{STACK}.3.1.net.0.0.weight", (1024, 512), r"layers\.3\.1\.net\.0\.0\.weight is 1024"),
        (f"{STACK}.32.0.weight", (512,), "33 members"),
        ("transformer.pos_emb.emb.weight", (92, 64), "pos_emb"),
    ],
)
def test_shapes_of_a_bert_encoder_that_contradict_each_other_are_an_error(name, shape, message):
    shapes = bert_shapes(LAYOUT2IMG) | {name: shape}

    with pytest.raises(WeightsError, match=message):
        read_bert(shapes, pad_token_id=0)


def test_heads_of_a_bert_encoder_have_64_channels():
    narrow = bert_shapes(replace(TINY, bert_inner=192, text_width=96))
    odd = bert_shapes(replace(TINY, bert_inner=200))

    assert read_bert(narrow, pad_token_id=None).num_heads == 3
    with pytest.raises(WeightsError, match="has 200 rows; a multiple of 64"):
        read_bert(odd, pad_token_id=None)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "channel_mapper.weight is missing"),
        ({"channel_mapper.weight": (3, 182, 3, 3)}, "covers 3x3 pixels"),
        (
            {"channel_mapper.weight": (3, 182, 1, 1), "channel_mapper.bias": (3,)},
            "has channel_mapper.bias in addition to",
        ),
    ],
)
def test_a_segmentation_encoder_of_another_kind_is_an_error(shapes, message):
    with pytest.raises(WeightsError, match=message):
        read_channel_mapper(shapes)


def test_a_class_embedding_is_a_matrix():
    assert read_class_embedding({"embedding.weight": (11, 96)}) == (11, 96)
    with pytest.raises(WeightsError, match="2 axes were expected"):
        read_class_embedding({"embedding.weight": (11,)})


class CountedShapes(dict):
    """Shapes that count how often all names are looked through."""

    rounds = 0

    def __iter__(self):
        self.rounds += 1
        return super().__iter__()


def test_names_are_looked_through_equally_often_however_many_blocks_there_are():
    def rounds(num_res_blocks):
        layout = replace(SMALL, num_res_blocks=num_res_blocks)
        shapes = CountedShapes(unet_shapes(layout))
        unet(shapes)
        shapes_of_autoencoder = CountedShapes(autoencoder_shapes(layout))
        autoencoder(shapes_of_autoencoder)
        return shapes.rounds, shapes_of_autoencoder.rounds

    few, many = rounds(1), rounds(30)

    assert few == many
    assert max(few) > 0


@pytest.mark.parametrize("stack", ["input_blocks", "output_blocks"])
def test_more_blocks_than_any_model_has_are_an_error(stack):
    more = {f"{stack}.{index}.0.op.weight": (32, 32, 3, 3) for index in range(9999)}

    with pytest.raises(WeightsError, match=f"{stack} has 9999 members; no model has more than 128"):
        unet(unet_shapes(SMALL) | more)


def test_more_levels_than_any_autoencoder_has_are_an_error():
    more = {f"encoder.down.{level}.block.0.conv1.weight": (32, 32, 3, 3) for level in range(9999)}

    with pytest.raises(WeightsError, match=r"encoder\.down has 9999 members"):
        autoencoder(autoencoder_shapes(SMALL) | more)
