"""First stages with a codebook, or without attention, against diffusers' own."""

from dataclasses import replace

import pytest
import torch

from ldm_export.networks.autoencoder import LatentDecoder, LatentEncoder
from ldm_export.networks.quantizer import Quantizer
from ldm_runtime.testing import autoencoder_spec
from tests.reference.first_stage_twin import load_first_stage
from tests.reference.test_networks_reference import checkpoint_of, randomised, relative_error

pytestmark = pytest.mark.reference

TOLERANCE = 1e-5  # of the largest value
VQ_F4 = autoencoder_spec(
    kind="vq",
    channels=32,
    channel_mult=(1, 2, 2),
    z_channels=3,
    embed_dim=3,
    codebook_size=1024,
    latent_scale_factor=1.0,
)
KL_F4 = replace(VQ_F4, kind="kl", codebook_size=None)
AUTOENCODERS = {
    "vq_f4": VQ_F4,
    "vq_f4_noattn": replace(VQ_F4, middle_attention=False),
    "vq_f8": replace(
        VQ_F4, channel_mult=(1, 1, 2, 2), attention_levels=(3,), z_channels=4, embed_dim=4
    ),
    "vq_f8_n256": replace(VQ_F4, codebook_size=256, z_channels=4, embed_dim=4),
    "vq_other_widths": replace(VQ_F4, z_channels=8, embed_dim=4, codebook_size=700),
    "kl_f4": KL_F4,
    "kl_without_attention": replace(KL_F4, middle_attention=False),
    "kl_f16": replace(
        KL_F4, channel_mult=(1, 1, 1, 2, 2), attention_levels=(4,), z_channels=16, embed_dim=16
    ),
    "kl_f32": replace(
        KL_F4,
        channel_mult=(1, 1, 1, 1, 2, 2),
        num_res_blocks=1,
        attention_levels=(4, 5),
        z_channels=64,
        embed_dim=64,
    ),
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def twins(spec):
    """Return our two halves and diffusers' model with their weights."""
    encoder, decoder = randomised(LatentEncoder(spec)), randomised(LatentDecoder(spec), seed=1)
    return encoder, decoder, load_first_stage(spec, checkpoint_of("", encoder, decoder))


@pytest.mark.parametrize("spec", AUTOENCODERS.values(), ids=AUTOENCODERS)
def test_first_stage_encodes_and_decodes_as_diffusers_does(spec):
    encoder, decoder, theirs = twins(spec)
    size = (3 * spec.factor, 2 * spec.factor) if spec.factor > 8 else (40, 24)
    image = torch.rand(2, 3, *size) * 2 - 1
    latents = torch.randn(2, spec.embed_dim, *(side // spec.factor for side in size))

    moments, decoded = encoder(image), decoder(latents)

    encoded = theirs.encode(image)
    expected = encoded.latents if spec.kind == "vq" else encoded.latent_dist.parameters
    assert relative_error(moments, expected) <= TOLERANCE
    assert relative_error(decoded, theirs.decode(latents).sample) <= TOLERANCE


def test_decoding_depends_on_latents_only_through_their_nearest_codes():
    _, decoder, _ = twins(VQ_F4)
    latents = torch.randn(1, 3, 8, 8)
    codes = decoder.quantize(latents)

    decoded = decoder(latents)

    assert torch.equal(decoded, decoder(codes))
    assert (codes - latents).abs().max() > 0.01


def test_a_first_stage_without_attention_has_no_weights_for_it():
    spec = replace(VQ_F4, middle_attention=False)

    names = [name for name, _ in LatentDecoder(spec).named_parameters()]

    assert not any("attn" in name for name in names)
    assert "quantize.embedding.weight" in names


# The codebook, held against plain arithmetic


def quantizer(num_codes, dim, seed=0):
    torch.manual_seed(seed)
    network = Quantizer(num_codes, dim).requires_grad_(False)
    network.embedding.weight.normal_()
    return network


def distances(network, latents):
    """Return all distances, in float64: (B, h, w, codes)."""
    return torch.cdist(latents.double().permute(0, 2, 3, 1), network.embedding.weight.double())


@pytest.mark.parametrize(("num_codes", "dim"), [(8192, 3), (16384, 4), (256, 4), (700, 8), (1, 2)])
def test_the_nearest_code_is_nearest(num_codes, dim):
    network = quantizer(num_codes, dim)
    latents = 2 * torch.randn(2, dim, 9, 5)

    nearest = network.nearest(latents)

    table = distances(network, latents)
    found = table.gather(3, nearest[..., None])[..., 0]
    assert nearest.shape == (2, 9, 5)
    assert (found - table.amin(dim=3)).max() <= 1e-6


def test_of_codes_that_are_equally_near_the_first_is_taken():
    network = quantizer(8192, 3)
    repeated = [5, 300, 511, 512, 4000, 8191]  # in one piece of the codebook, and in others
    network.embedding.weight[repeated] = network.embedding.weight[repeated[0]].clone()
    latents = network.embedding.weight[repeated[0]].reshape(1, 3, 1, 1).expand(2, 3, 4, 6)

    nearest = network.nearest(latents)

    assert torch.equal(nearest, torch.full((2, 4, 6), repeated[0]))


def test_no_table_of_all_pixels_and_all_codes_is_made():
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for each in out if isinstance(out, tuple | list) else [out]:
                largest = max(largest, each.numel())
            return out

    network, latents = quantizer(8192, 3), torch.randn(1, 3, 32, 32)
    with Watch():
        network(latents)

    assert largest == 32 * 32 * 512
