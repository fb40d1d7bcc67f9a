import mmap

import numpy as np
import pytest
import torch

from ldm_export.errors import WeightsError
from ldm_export.networks.loading import build_network, load_network
from ldm_runtime.components import COMPONENTS
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


@pytest.mark.parametrize("component", sorted(COMPONENTS))
def test_a_loaded_network_is_equal_to_the_one_that_was_stored(component, networks):
    network = networks[component]

    loaded = load_network(component, SPEC, stored(network))

    assert loaded.state_dict().keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


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
