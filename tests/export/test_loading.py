import mmap

import numpy as np
import pytest
import torch

from ldm_export.errors import WeightsError
from ldm_export.networks.loading import build_network, load_network, restore_weights
from ldm_runtime.specs.model import components_of
from tests.export.paper_networks import CASES, FIRST_STAGE
from tests.export.small_checkpoint import random_networks
from tests.export.small_spec import SPEC


class Stored:
    """A weight in memory."""

    def __init__(self, array):
        self.array = array
        self.shape = array.shape

    def numpy(self):
        return self.array


@pytest.fixture(scope="module")
def networks():
    return vars(random_networks())


@pytest.fixture
def weights(networks):
    return stored(networks["vae_decoder"])


def stored(network):
    return {name: Stored(tensor.numpy()) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("component", sorted(components_of(SPEC)))
def test_a_loaded_network_is_equal_to_the_one_that_was_stored(component, networks):
    network = networks[component]

    loaded = load_network(component, SPEC, stored(network))

    assert loaded.state_dict().keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_changed_network_is_given_its_weights_again_in_place(networks):
    network = networks["vae_decoder"]
    weights = stored(network)
    matrix = "decoder.mid.attn_1.q.weight"
    weights[matrix] = Stored(weights[matrix].array[:, :, 0, 0])
    loaded = load_network("vae_decoder", SPEC, weights)
    places = [each.data_ptr() for each in loaded.parameters()]
    for parameter in loaded.parameters():
        parameter.data.mul_(2)

    restore_weights("vae_decoder", loaded, weights)

    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert [each.data_ptr() for each in loaded.parameters()] == places


def test_attention_that_is_stored_as_matrices_is_loaded_as_the_same_network(networks):
    network = networks["vae_decoder"]
    names = [f"decoder.mid.attn_1.{part}.weight" for part in ("q", "k", "v", "proj_out")]
    weights = stored(network)
    for name in names:
        weights[name] = Stored(weights[name].array[:, :, 0, 0])

    loaded = load_network("vae_decoder", SPEC, weights)

    for name in names:
        assert torch.equal(loaded.state_dict()[name], network.state_dict()[name])


def shapes_of(component, spec):
    network = build_network(component, spec)
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


#: Names as the code of the paper gives them, and shapes: one or two of each kind of layer.
NAMES = {
    "unet_of_attention_blocks": {
        "input_blocks.0.0.weight": (32, 7, 3, 3),
        "input_blocks.1.0.emb_layers.1.weight": (64, 128),
        "input_blocks.2.0.in_layers.2.weight": (32, 32, 3, 3),  # halves the resolution
        "input_blocks.3.1.qkv.weight": (192, 64, 1),
        "input_blocks.3.1.proj_out.weight": (64, 64, 1),
        "middle_block.1.norm.weight": (64,),
        "output_blocks.1.2.out_layers.3.weight": (64, 64, 3, 3),  # doubles it
    },
    "unet_of_one_head_and_one_token": {
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (96, 48),
        "input_blocks.2.0.op.weight": (32, 32, 3, 3),
    },
    "unet_of_classes": {
        "label_emb.weight": (1000, 128),
        "input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight": (32, 96),  # of the context
        "middle_block.1.transformer_blocks.0.attn1.to_k.weight": (64, 64),
    },
    "bert": {
        "transformer.token_emb.weight": (8192, 96),
        "transformer.pos_emb.emb.weight": (92, 96),
        "transformer.attn_layers.layers.0.0.weight": (96,),
        "transformer.attn_layers.layers.0.1.to_q.weight": (128, 96),
        "transformer.attn_layers.layers.2.1.to_out.bias": (96,),
        "transformer.attn_layers.layers.3.1.net.0.0.weight": (384, 96),
        "transformer.attn_layers.layers.3.1.net.2.weight": (96, 384),
        "transformer.norm.bias": (96,),
    },
    "unet_of_vectors": {
        "label_emb.0.0.weight": (128, 96),
        "label_emb.0.2.weight": (128, 128),
    },
    "image_encoder": {
        "conv1.weight": (64, 3, 4, 4),
        "class_embedding": (64,),
        "positional_embedding": (10, 64),
        "ln_pre.weight": (64,),
        "transformer.resblocks.1.attn.in_proj_weight": (192, 64),
        "transformer.resblocks.1.mlp.c_fc.weight": (128, 64),
        "ln_post.bias": (64,),
        "proj": (64, 48),
    },
    "class_embedder": {"embedding.weight": (11, 48)},
    "segmentation_encoder": {"channel_mapper.weight": (3, 182, 1, 1)},
    "encoder_without_attention": {
        "encoder.conv_out.weight": (3, 64, 3, 3),
        "quant_conv.weight": (3, 3, 1, 1),
    },
    "decoder_with_a_codebook": {
        "quantize.embedding.weight": (1100, 3),
        "decoder.mid.attn_1.q.weight": (64, 64, 1, 1),
    },
}


@pytest.mark.parametrize("case", CASES)
def test_parameters_have_the_names_and_shapes_of_the_papers_checkpoints(case):
    found = shapes_of(*CASES[case])

    assert NAMES[case].items() <= found.items()


@pytest.mark.parametrize("case", CASES)
def test_networks_of_the_paper_load_strictly(case):
    weights = {
        name: Stored(np.ones(shape, np.float32)) for name, shape in shapes_of(*CASES[case]).items()
    }
    component, spec = CASES[case]
    dropped = next(iter(weights))

    load_network(component, spec, weights)
    del weights[dropped]

    with pytest.raises(WeightsError, match=f"missing: {dropped}"):
        load_network(component, spec, weights)


def test_only_attention_that_is_there_has_weights():
    assert not any("attn" in name for name in shapes_of(*CASES["encoder_without_attention"]))


def test_a_codebook_of_another_size_is_not_loaded():
    weights = {
        name: Stored(np.ones(shape, np.float32))
        for name, shape in shapes_of("vae_decoder", FIRST_STAGE).items()
    }
    weights["quantize.embedding.weight"] = Stored(np.ones((1000, 3), np.float32))

    with pytest.raises(WeightsError, match=r"quantize\.embedding\.weight \(\(1000, 3\), expected"):
        load_network("vae_decoder", FIRST_STAGE, weights)


def test_a_network_without_weights_takes_no_memory():
    network = build_network("unet", SPEC)

    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


def test_half_precision_weights_are_widened(weights):
    name = "decoder.conv_in.weight"
    weights[name] = Stored(weights[name].array.astype(np.float16))

    loaded = load_network("vae_decoder", SPEC, weights)

    assert loaded.state_dict()[name].dtype == torch.float32
    np.testing.assert_array_equal(loaded.state_dict()[name].numpy(), weights[name].array)


def test_a_loaded_network_does_not_share_memory_with_the_checkpoint(weights):
    name = "decoder.conv_in.bias"
    before = weights[name].array.copy()

    loaded = load_network("vae_decoder", SPEC, weights)
    weights[name].array[:] = 0

    np.testing.assert_array_equal(loaded.state_dict()[name].numpy(), before)
    weights[name].array[:] = before


def test_weights_are_read_from_a_mapped_file(weights, tmp_path):
    name = "decoder.conv_in.bias"
    path = tmp_path / "bias"
    path.write_bytes(weights[name].array.tobytes())
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped = np.frombuffer(mapping, np.float32)
    expected = weights[name].array
    weights[name] = Stored(mapped[:])

    loaded = load_network("vae_decoder", SPEC, weights)

    np.testing.assert_array_equal(loaded.state_dict()[name].numpy(), expected)
    np.testing.assert_array_equal(mapped, expected)  # still readable after its pages went back


def test_missing_weights_are_listed(weights):
    del weights["decoder.conv_in.bias"], weights["post_quant_conv.weight"]

    with pytest.raises(WeightsError) as caught:
        load_network("vae_decoder", SPEC, weights)

    message = str(caught.value)
    assert "vae_decoder" in message
    assert "missing: post_quant_conv.weight, decoder.conv_in.bias" in message


def test_left_over_weights_are_listed(weights):
    weights["decoder.extra.weight"] = Stored(np.zeros(1, np.float32))

    with pytest.raises(WeightsError, match=r"not part of it: decoder\.extra\.weight"):
        load_network("vae_decoder", SPEC, weights)


def test_weights_of_another_shape_are_listed_with_both_shapes(weights):
    weights["decoder.conv_in.bias"] = Stored(np.zeros(3, np.float32))

    with pytest.raises(WeightsError, match=r"conv_in\.bias \(\(3,\), expected \(64,\)\)"):
        load_network("vae_decoder", SPEC, weights)


def test_a_long_list_is_cut_and_counted(networks):
    with pytest.raises(WeightsError, match=r", .* and \d+ more"):
        load_network("unet", SPEC, {})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(weights, value):
    name = "decoder.conv_in.weight"
    broken = weights[name].array.copy()
    broken[0, 0, 1, 1] = value
    weights[name] = Stored(broken)

    with pytest.raises(WeightsError, match=r"decoder\.conv_in\.weight.*not finite"):
        load_network("vae_decoder", SPEC, weights)
