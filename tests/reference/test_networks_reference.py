"""Every network of ours against its twin in diffusers or transformers, in torch and float32.

All weights are random, also those that training starts at zero, and no output is near zero: a
comparison of zeros cannot pass here. What is left between two twins is the rounding of float32:
nothing in the UNet and the text encoder, 3e-6 in the autoencoder, whose attention diffusers
projects with linear layers and not with 1x1 convolutions.
"""

from dataclasses import replace

import pytest
import torch

from ldm_export.networks.autoencoder import LatentDecoder, LatentEncoder
from ldm_export.networks.clip import ClipTextEncoder
from ldm_export.networks.unet import UNet
from released.compvis_files import compvis_config
from tests.export.small_checkpoint import AUTOENCODER, TEXT_ENCODER, UNET
from tests.reference.first_stage_twin import load_first_stage
from tests.reference.twins import (
    load_autoencoder,
    load_text_encoder,
    load_unet,
)

pytestmark = pytest.mark.reference

TOLERANCE = 1e-5  # of the largest value
SMALL = 0.03  # activations of this scale have a variance that 1e-5 and 1e-6 change differently

UNETS = {
    "stable_diffusion_1": UNET,
    "eight_heads_deep": replace(
        UNET, channel_mult=(1, 2, 4), num_res_blocks=2, transformer_depth=(1, 1, 0)
    ),
    "attention_everywhere": replace(UNET, channel_mult=(1, 3), transformer_depth=(1, 1)),
    "channels_no_power_of_two": replace(UNET, model_channels=96),  # timestep features round
    "stable_diffusion_2": replace(
        UNET,
        channel_mult=(1, 2, 4),
        transformer_depth=(1, 1, 0),
        num_heads=None,
        num_head_channels=16,
        linear_projection=True,
    ),
    "depth_2": replace(UNET, transformer_depth=(0, 2), middle_depth=2),
    "depth_2_linear": replace(
        UNET,
        channel_mult=(1, 2, 2),
        transformer_depth=(2, 2, 0),
        middle_depth=2,
        num_heads=None,
        num_head_channels=8,
        linear_projection=True,
    ),
    "inpainting": replace(UNET, in_channels=9),
    "layouts_depth_3": replace(
        UNET,
        in_channels=3,
        out_channels=3,
        channel_mult=(1, 2, 3),
        transformer_depth=(0, 3, 3),
        middle_depth=3,
        num_heads=None,
        num_head_channels=32,
    ),
    "one_head_of_all_channels": replace(
        UNET, channel_mult=(1, 3, 5), transformer_depth=(0, 1, 1), num_heads=1
    ),
}
AUTOENCODERS = {
    "factor_4": AUTOENCODER,
    "factor_8": replace(AUTOENCODER, channel_mult=(1, 2, 2, 4), num_res_blocks=2),
    "one_level": replace(AUTOENCODER, channel_mult=(1,), z_channels=3, embed_dim=3),
}
TEXT_ENCODERS = {
    "quick_gelu": replace(TEXT_ENCODER, num_heads=4, vocab_size=600),
    "gelu": replace(
        TEXT_ENCODER, num_heads=2, vocab_size=600, num_layers=3, context_layers=3, activation="gelu"
    ),
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def randomised(network, *, scale=1.0, seed=0):
    """Fill every parameter with values that keep the activations near `scale`."""
    torch.manual_seed(seed)
    for name, parameter in network.eval().requires_grad_(False).named_parameters():
        if parameter.ndim > 1:
            spread = 0.5 if "embedding" in name else parameter[0].numel() ** -0.5
            parameter.normal_(std=spread * scale)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1 * scale)
        else:
            parameter.normal_(mean=1.0, std=0.1)  # of a normalisation
    return network


def checkpoint_of(prefix, *networks):
    return {
        prefix + name: parameter
        for network in networks
        for name, parameter in network.state_dict().items()
    }


def unets(spec, scale=1.0):
    ours = randomised(UNet(spec), scale=scale)
    state = checkpoint_of("model.diffusion_model.", ours)
    if spec.num_head_channels is None or spec.linear_projection:
        return ours, load_unet(state, compvis_config(spec, AUTOENCODER))
    one_head = replace(spec, num_heads=1, num_head_channels=None)
    theirs = load_unet(state, compvis_config(one_head, AUTOENCODER))
    return ours, with_heads_of(theirs, spec.num_head_channels)


def with_heads_of(twin, channels):
    """Give every attention heads of a size, which its loader reads with linear layers alone."""
    for module in twin.modules():
        if hasattr(module, "to_q"):
            module.heads, module.scale = module.to_q.out_features // channels, channels**-0.5
    return twin


def autoencoders(spec, scale=1.0):
    encoder = randomised(LatentEncoder(spec), scale=scale)
    decoder = randomised(LatentDecoder(spec), scale=scale, seed=1)
    state = checkpoint_of("first_stage_model.", encoder, decoder)
    return encoder, decoder, load_autoencoder(state, compvis_config(UNET, spec))


def text_encoders(spec, folder, scale=1.0):
    ours = randomised(ClipTextEncoder(spec), scale=scale)
    state = checkpoint_of("cond_stage_model.transformer.", ours)
    return ours, load_text_encoder(state, spec, folder)


def relative_error(ours, theirs):
    """Return the largest difference as a share of the largest value; refuse to compare nothing."""
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.01
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("size", [(8, 8), (20, 12)])
@pytest.mark.parametrize("spec", UNETS.values(), ids=UNETS)
def test_unet_predicts_what_diffusers_unet_predicts(spec, size):
    ours, theirs = unets(spec)
    latents = torch.randn(2, spec.in_channels, *size)
    timesteps = torch.tensor([981.0, 17.25])
    context = torch.randn(2, 77, spec.context_dim)

    prediction = ours(latents, timesteps, context)

    expected = theirs(latents, timesteps, context).sample
    assert relative_error(prediction, expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["stable_diffusion_1", "stable_diffusion_2"])
def test_unet_agrees_where_the_epsilons_decide(name):
    ours, theirs = unets(UNETS[name], scale=SMALL)
    latents, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 64)
    timesteps = torch.tensor([500.0])

    prediction = ours(latents, timesteps, context)

    expected = theirs(latents, timesteps, context).sample
    assert relative_error(prediction, expected) <= TOLERANCE


def test_unet_heeds_every_input():
    network = randomised(UNet(UNET))
    latents, timesteps, context = (
        torch.randn(1, 4, 8, 8),
        torch.tensor([500.0]),
        torch.randn(1, 7, 64),
    )

    prediction = network(latents, timesteps, context)

    changed = [
        network(latents.flip(3), timesteps, context),
        network(latents, timesteps - 100, context),
        network(latents, timesteps, context.flip(2)),
    ]
    assert all((other - prediction).std() > 0.01 for other in changed)


@pytest.mark.parametrize("size", [(32, 32), (72, 40)])
@pytest.mark.parametrize("spec", AUTOENCODERS.values(), ids=AUTOENCODERS)
def test_autoencoder_encodes_and_decodes_as_diffusers_does(spec, size):
    encoder, decoder, theirs = autoencoders(spec)
    image = torch.rand(2, spec.image_channels, *size) * 2 - 1
    latents = torch.randn(2, spec.embed_dim, *(side // spec.factor for side in size))

    moments, decoded = encoder(image), decoder(latents)

    expected_moments = theirs.encode(image).latent_dist.parameters
    assert relative_error(moments, expected_moments) <= TOLERANCE
    assert relative_error(decoded, theirs.decode(latents).sample) <= TOLERANCE


def test_autoencoder_agrees_where_the_epsilons_decide():
    encoder, decoder, theirs = autoencoders(AUTOENCODER, scale=0.2)
    image, latents = torch.rand(1, 3, 32, 32) * 2 - 1, torch.randn(1, 4, 8, 8)

    moments, decoded = encoder(image), decoder(latents)

    expected_moments = theirs.encode(image).latent_dist.parameters
    assert relative_error(moments, expected_moments) <= TOLERANCE
    assert relative_error(decoded, theirs.decode(latents).sample) <= TOLERANCE


def test_autoencoder_attends_on_the_levels_where_diffusers_does():
    spec = replace(AUTOENCODER, attention_levels=(1, 2))
    encoder, decoder = randomised(LatentEncoder(spec)), randomised(LatentDecoder(spec), seed=1)
    theirs = load_first_stage(spec, checkpoint_of("", encoder, decoder))
    image, latents = torch.rand(2, 3, 40, 24) * 2 - 1, torch.randn(2, 4, 10, 6)

    moments, decoded = encoder(image), decoder(latents)

    expected_moments = theirs.encode(image).latent_dist.parameters
    assert relative_error(moments, expected_moments) <= TOLERANCE
    assert relative_error(decoded, theirs.decode(latents).sample) <= TOLERANCE


@pytest.mark.parametrize("length", [77, 5])
@pytest.mark.parametrize("spec", TEXT_ENCODERS.values(), ids=TEXT_ENCODERS)
def test_text_encoder_gives_the_context_of_transformers(spec, length, tmp_path):
    ours, theirs = text_encoders(spec, tmp_path)
    tokens = torch.randint(spec.vocab_size, (2, length))

    context = ours(tokens)

    expected = theirs(tokens).last_hidden_state
    assert relative_error(context, expected) <= TOLERANCE


def test_text_encoder_agrees_where_the_epsilons_decide(tmp_path):
    spec = TEXT_ENCODERS["quick_gelu"]
    ours, theirs = text_encoders(spec, tmp_path, scale=SMALL)
    tokens = torch.randint(spec.vocab_size, (1, 77))

    context = ours(tokens)

    expected = theirs(tokens).last_hidden_state
    assert relative_error(context, expected) <= TOLERANCE


def test_text_encoder_activations_differ_enough_to_be_told_apart():
    spec = TEXT_ENCODERS["quick_gelu"]
    tokens = torch.randint(spec.vocab_size, (1, 77))

    quick = randomised(ClipTextEncoder(spec))(tokens)
    exact = randomised(ClipTextEncoder(replace(spec, activation="gelu")))(tokens)

    assert relative_error(quick, exact) > 100 * TOLERANCE
