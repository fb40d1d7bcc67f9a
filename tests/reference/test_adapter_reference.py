"""Adapters against PEFT and LyCORIS, whose own code makes the tensors and saves the files."""

import copy

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from lycoris import LycorisNetwork, create_lycoris
from lycoris.functional import apply_dora_scale
from lycoris.functional import locon as locon_functions
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn

from ldm_runtime.adapters.files import read_adapter

pytestmark = pytest.mark.reference

TOLERANCE = 1e-5  # of the largest value
LAYERS = ("proj_in", "conv1", "conv_shortcut")


class Network(nn.Module):
    """A layer of each kind that adapters change, with the names of diffusers."""

    def __init__(self):
        super().__init__()
        self.proj_in = nn.Linear(24, 16)
        self.conv1 = nn.Conv2d(12, 20, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(12, 20, 1)
        self.norm1 = nn.GroupNorm(2, 6)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network().requires_grad_(False)


def weights(network):
    return {name: network.get_submodule(name).weight.numpy().copy() for name in LAYERS}


def train(adapter):
    """Make all tensors of an adapter random, and its magnitudes near what they were."""
    with torch.no_grad():
        for name, each in adapter.named_parameters():
            if "dora_scale" in name or "magnitude" in name:
                each.mul_(0.5 + torch.rand_like(each))
            elif each.requires_grad:
                each.copy_(0.3 * torch.randn_like(each))


def relative_error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def forward_weight(layer, bias):
    """Return the weight that a layer applies, from its answers to impulses."""
    if isinstance(layer, nn.Linear):
        return (layer(torch.eye(layer.in_features)) - bias).T.detach().numpy()
    size = layer.kernel_size[0]
    impulses = torch.zeros(layer.in_channels, layer.in_channels, size, size)
    for channel in range(layer.in_channels):
        impulses[channel, channel, size // 2, size // 2] = 1
    answers = (layer(impulses) - bias[:, None, None]).detach().numpy()
    return answers.swapaxes(0, 1)[:, :, ::-1, ::-1]


def tensors_of(file):
    """Return the names of the tensors of each layer in a file."""
    return {name: set(layer.tensors) for (_, name), layer in read_adapter(file).layers.items()}


def assert_adapted(file, before, after, scale=1.0, component="unet"):
    layers = read_adapter(file).layers
    assert layers.keys() == {(component, name) for name in before}
    for name, weight in before.items():
        found = layers[component, name].adapted(weight, scale)
        assert relative_error(found, after[name]) <= TOLERANCE, name
        assert relative_error(found, weight) > 0.01, name


# --- LyCORIS --------------------------------------------------------------------------------------

LYCORIS = {
    "lora": {"algo": "lora"},
    "tucker": {"algo": "locon", "use_tucker": True},
    "loha": {"algo": "loha"},
    "loha with cores": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 2},
    "lokr with cores": {"algo": "lokr", "factor": 2, "use_tucker": True},
    "lokr of two products": {
        "algo": "lokr",
        "factor": 4,
        "linear_dim": 1,
        "conv_dim": 1,
        "decompose_both": True,
    },
    "lokr of two full factors": {"algo": "lokr", "full_matrix": True},
    "rank-stabilised": {"algo": "lora", "rs_lora": True},
}
OPTIONS = {"linear_dim": 3, "linear_alpha": 1.5, "conv_dim": 3, "conv_alpha": 1.5}


def lycoris(network, **options):
    """Train a network of LyCORIS on all layers but the norm, at random."""
    LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"], "lora_prefix": "lycoris"})
    adapter = create_lycoris(network, 1.0, **OPTIONS | options)
    adapter.apply_to()
    train(adapter)
    return adapter


def forward_weights(network):
    return {
        name: forward_weight(network.get_submodule(name), network.get_submodule(name).bias)
        for name in LAYERS
    }


@pytest.mark.parametrize("scale", [1.0, 0.5, -0.3])
@pytest.mark.parametrize("kind", LYCORIS)
def test_a_file_of_lycoris_gives_the_weights_that_it_applies(network, tmp_path, kind, scale):
    before = weights(network)
    adapter = lycoris(network, **LYCORIS[kind])
    adapter.save_weights(str(tmp_path / "a.safetensors"), None, None)

    adapter.set_multiplier(scale)

    assert_adapted(tmp_path / "a.safetensors", before, forward_weights(network), scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_files_of_half_the_size_and_pickles_are_read(network, tmp_path, dtype, suffix):
    before = weights(network)
    adapter = lycoris(network)
    path = tmp_path / f"a.{suffix}"
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(parameter.to(dtype))

    adapter.save_weights(str(path), dtype, None)

    assert_adapted(path, before, forward_weights(network))


@pytest.mark.parametrize("along_outputs", [True, False])
@pytest.mark.parametrize("kind", ["lora", "tucker", "loha", "lokr"])
def test_dora_of_lycoris_gives_the_weights_that_it_applies(network, tmp_path, kind, along_outputs):
    before = weights(network)
    adapter = lycoris(network, **LYCORIS[kind], dora_wd=True, wd_on_output=along_outputs)
    adapter.save_weights(str(tmp_path / "a.safetensors"), None, None)

    after = forward_weights(network)

    assert all("dora_scale" in names for names in tensors_of(tmp_path / "a.safetensors").values())
    assert_adapted(tmp_path / "a.safetensors", before, after)
    # Its modules scale the magnitudes alone, so that a scale of 0 is not the model.
    half = {name: (before[name] + after[name]) / 2 for name in LAYERS}
    assert_adapted(tmp_path / "a.safetensors", before, half, scale=0.5)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_dora_is_scaled_as_the_function_of_lycoris_does(network, tmp_path, scale):
    before = weights(network)
    adapter = lycoris(network, dora_wd=True, wd_on_output=False)
    adapter.save_weights(str(tmp_path / "a.safetensors"), None, None)
    after = {}
    for name in LAYERS:
        layer = getattr(adapter, f"lycoris_{name}")
        down, up = layer.lora_down.weight, layer.lora_up.weight
        change = locon_functions.diff_weight(down, up, None, gamma=layer.scale)
        weight = torch.from_numpy(before[name])
        merged = apply_dora_scale(weight, change.reshape(weight.shape), layer.dora_scale, scale)
        after[name] = merged.detach().numpy()

    assert_adapted(tmp_path / "a.safetensors", before, after, scale)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_full_differences_of_lycoris_are_added(network, tmp_path, scale):
    LycorisNetwork.apply_preset(
        {"target_module": ["Linear", "Conv2d", "GroupNorm"], "lora_prefix": "lycoris"}
    )
    adapter = create_lycoris(copy.deepcopy(network), 1.0, algo="full", train_norm=True)
    for each in adapter.loras:
        train(each)
        adapter.add_module(each.lora_name, each)
    path = tmp_path / "a.safetensors"
    save_file({name: value.contiguous() for name, value in _differences(adapter).items()}, path)
    layers = read_adapter(path).layers

    for name in (*LAYERS, "norm1"):
        module = network.get_submodule(name)
        theirs = getattr(adapter, f"lycoris_{name}")
        merged = theirs.get_merged_weight(scale, module.weight.shape)
        layer = layers["unet", name]
        found = (
            layer.adapted(module.weight.numpy(), scale),
            layer.adapted_bias(module.bias.numpy(), scale),
        )
        for ours, expected in zip(found, merged, strict=True):
            assert relative_error(ours, expected.detach().numpy()) <= TOLERANCE, name


def _differences(adapter):
    """Return the tensors of full differences, which LyCORIS saves only once it was applied."""
    names = {"weight": "diff", "bias": "diff_b"}
    tensors = {}
    for name, value in adapter.named_parameters():
        layer, _, tensor = name.rpartition(".")
        tensors[f"{layer}.{names.get(tensor, tensor)}"] = value.detach()
    return tensors


def test_a_textual_inversion_in_a_pickle_is_one_sentence(tmp_path):
    torch.save({"string_to_param": {"*": torch.ones(1, 8)}}, tmp_path / "cat.pt")

    with pytest.raises(ValueError, match=r"cat\.pt is a textual inversion and not an adapter;"):
        read_adapter(tmp_path / "cat.pt")


# --- PEFT -----------------------------------------------------------------------------------------

TARGETS = {"target_modules": list(LAYERS)}
PEFT = {
    "lora": LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **TARGETS),
    "patterns": LoraConfig(
        r=3,
        lora_alpha=5,
        rank_pattern={"conv1": 2},
        alpha_pattern={"conv1": 7, "^proj_in": 1},
        init_lora_weights=False,
        **TARGETS,
    ),
    "rank-stabilised": LoraConfig(
        r=4, lora_alpha=2, use_rslora=True, init_lora_weights=False, **TARGETS
    ),
    "dora": LoraConfig(r=3, lora_alpha=5, use_dora=True, init_lora_weights=False, **TARGETS),
    "loha": LoHaConfig(r=3, alpha=5, init_weights=False, **TARGETS),
    "loha with cores": LoHaConfig(
        r=3, alpha=5, use_effective_conv2d=True, init_weights=False, **TARGETS
    ),
    "lokr": LoKrConfig(r=2, alpha=3, init_weights=False, **TARGETS),
    "lokr of two products": LoKrConfig(
        r=1, alpha=2, decompose_both=True, init_weights=False, **TARGETS
    ),
    "lokr with cores": LoKrConfig(
        r=2, alpha=3, use_effective_conv2d=True, init_weights=False, **TARGETS
    ),
}


def trained(network, config):
    """Inject an adapter of PEFT into a network, and make its tensors random."""
    inject_adapter_in_model(config, network)
    train(network)
    return network


def merged_weights(network):
    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    return {
        name: network.get_submodule(name).get_base_layer().weight.detach().numpy()
        for name in LAYERS
    }


def save(network, folder, to_diffusers=lambda tensors: tensors):
    """Save an adapter as diffusers' training scripts do."""
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=to_diffusers(get_peft_model_state_dict(network)),
        **_collate_lora_metadata({"unet": network}),
    )
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("kind", PEFT)
def test_a_file_that_diffusers_saves_gives_the_weights_that_peft_merges(network, tmp_path, kind):
    before = weights(network)
    trained(network, PEFT[kind])

    path = save(network, tmp_path)

    assert_adapted(path, before, merged_weights(network))


def test_names_that_diffusers_converts_give_the_weights_that_peft_merges(network, tmp_path):
    before = weights(network)
    trained(network, PEFT["patterns"])

    path = save(network, tmp_path, convert_state_dict_to_diffusers)

    assert_adapted(path, before, merged_weights(network))


@pytest.mark.parametrize("scale", [0.5, -1.0])
def test_a_scale_of_lora_is_that_of_peft(network, tmp_path, scale):
    before = weights(network)
    trained(network, PEFT["lora"])
    path = save(network, tmp_path)

    for name in LAYERS:
        network.get_submodule(name).set_scale("default", scale)

    assert_adapted(path, before, merged_weights(network), scale)


@pytest.mark.parametrize("kind", ["lora", "patterns", "rank-stabilised", "dora", "loha", "lokr"])
def test_a_file_that_peft_saves_has_its_settings_next_to_it(network, tmp_path, kind):
    before = weights(network)
    model = get_peft_model(network, PEFT[kind])
    train(model)

    model.save_pretrained(tmp_path)

    path = tmp_path / "adapter_model.safetensors"
    assert_adapted(path, before, merged_weights(model.base_model.model))
    whole = read_adapter(path).sha256
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace("}", " }", 1))
    assert read_adapter(path).sha256 != whole
    config.unlink()
    with pytest.raises(ValueError, match=r"alpha is in adapter_config.json next to it; put that"):
        read_adapter(path)
