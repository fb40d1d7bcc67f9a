"""UNets without a context against diffusers' `UNet2DModel`, and their attention written plainly.

Shapes follow the released models, small: `lsun_churches` has scale and shift, residual blocks that
change the resolution and a fixed number of heads; `celeba` a fixed size of heads; `semantic` has
attention in the middle alone; `super_resolution` on its deepest level, `inpainting` 7 channels.
"""

from dataclasses import replace

import pytest
import torch

from ldm_export.networks.attention import AttentionBlock
from ldm_export.networks.unet import UNet
from ldm_runtime.testing import unet_spec
from tests.reference.test_networks_reference import randomised, relative_error
from tests.reference.unet_2d_twin import load_unet_2d

pytestmark = pytest.mark.reference

TOLERANCE = 1e-5  # of the largest value
CELEBA = unet_spec(
    in_channels=3,
    out_channels=3,
    model_channels=32,
    channel_mult=(1, 2, 3),
    attention="qkv",
    transformer_depth=(0, 1, 1),
    num_heads=None,
    num_head_channels=16,
    context_dim=None,
)
UNETS = {
    "celeba": CELEBA,
    "lsun_churches": replace(
        CELEBA,
        in_channels=4,
        out_channels=4,
        transformer_depth=(1, 1, 1),
        num_heads=8,
        num_head_channels=None,
        scale_shift_norm=True,
        resblock_updown=True,
    ),
    "super_resolution": replace(CELEBA, in_channels=6, transformer_depth=(0, 0, 1)),
    "inpainting": replace(
        CELEBA, in_channels=7, num_heads=8, num_head_channels=None, resblock_updown=True
    ),
    "semantic": replace(
        CELEBA,
        in_channels=6,
        channel_mult=(1, 4),
        transformer_depth=(0, 0),
        num_heads=8,
        num_head_channels=None,
    ),
    "scaled_and_shifted_by_convolutions": replace(CELEBA, scale_shift_norm=True),
    "no_attention_beside_changes_of_resolution": replace(
        CELEBA, transformer_depth=(0, 0, 0), resblock_updown=True
    ),
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("size", [(8, 8), (20, 12)])
@pytest.mark.parametrize("spec", UNETS.values(), ids=UNETS)
def test_unet_predicts_what_diffusers_unet_2d_predicts(spec, size):
    ours = randomised(UNet(spec))
    theirs = load_unet_2d(spec, ours.state_dict())
    latents, timesteps = torch.randn(2, spec.in_channels, *size), torch.tensor([981.0, 17.25])

    prediction = ours(latents, timesteps)

    expected = theirs(latents, timesteps).sample
    assert relative_error(prediction, expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["celeba", "lsun_churches"])
def test_unet_agrees_where_the_epsilons_decide(name):
    ours = randomised(UNet(UNETS[name]), scale=0.03)
    theirs = load_unet_2d(UNETS[name], ours.state_dict())
    latents = torch.randn(1, UNETS[name].in_channels, 8, 8)
    timesteps = torch.tensor([500.0])

    prediction = ours(latents, timesteps)

    expected = theirs(latents, timesteps).sample
    assert relative_error(prediction, expected) <= TOLERANCE


def test_an_attention_block_attends_in_the_order_that_the_paper_calls_legacy():
    """Its arithmetic: heads first, then query, key and value, each scaled before the product."""
    heads, channels = 4, 32
    spec = replace(CELEBA, num_heads=heads, num_head_channels=None)
    block = randomised(AttentionBlock(spec, channels))
    hidden = torch.randn(2, channels, 5, 3)

    attended = block(hidden)

    tokens = hidden.flatten(2)
    fused = torch.conv1d(block.norm(tokens), block.qkv.weight, block.qkv.bias)
    per_head = fused.reshape(2 * heads, 3 * channels // heads, -1)
    query, key, value = per_head.split(channels // heads, dim=1)
    scale = (channels // heads) ** -0.25
    weights = torch.einsum("bct,bcs->bts", query * scale, key * scale).softmax(dim=-1)
    mixed = torch.einsum("bts,bcs->bct", weights, value).reshape(2, channels, -1)
    plain = tokens + torch.conv1d(mixed, block.proj_out.weight, block.proj_out.bias)
    assert relative_error(attended.flatten(2), plain) <= TOLERANCE


def test_query_key_and_value_in_thirds_would_give_another_picture():
    spec = replace(CELEBA, num_heads=4, num_head_channels=None)
    block, hidden = randomised(AttentionBlock(spec, 32)), torch.randn(1, 32, 4, 4)
    attended = block(hidden)

    order = torch.arange(96).reshape(4, 3, 8).transpose(0, 1).flatten()
    block.qkv.weight.copy_(block.qkv.weight[order])
    block.qkv.bias.copy_(block.qkv.bias[order])

    assert relative_error(block(hidden), attended) > 1000 * TOLERANCE


def test_a_unet_without_context_heeds_its_other_inputs():
    network = randomised(UNet(UNETS["semantic"]))
    latents, timesteps = torch.randn(1, 6, 8, 8), torch.tensor([500.0])
    prediction = network(latents, timesteps)

    other_condition = latents.clone()
    other_condition[:, 3:] = 0

    for changed in (network(other_condition, timesteps), network(latents, timesteps - 100)):
        assert (changed - prediction).std() > 0.01
