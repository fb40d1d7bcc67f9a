"""The work of the networks of the latent-diffusion paper, against what torch counts."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldm_export.networks.loading import build_network
from ldm_runtime.benchmark.work import image_encoder_work, network_work
from ldm_runtime.specs.networks import ImageEncoderSpec
from released import random_checkpoints
from released.narrow_models import narrowed
from released.released_models import MODELS
from tests.export.paper_networks import VARIATION

COUNTED = ("text_encoder", "unet", "vae_decoder")
IMAGES, ROWS, HEIGHT, WIDTH = 2, 4, 16, 32
#: One row of every kind of network.
NAMES = (
    "lsun_churches256",
    "cin256-v2",
    "text2img256",
    "layout2img-openimages256",
    "bsr_sr",
    "inpainting_big",
    "vq-f8",
)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device="meta")


def inputs_of(component, spec):
    tokens = (
        1 if spec.networks.get("text_encoder") is None else spec.networks["text_encoder"].max_tokens
    )
    if component == "text_encoder":
        return (zeros(ROWS // IMAGES, tokens, dtype=torch.int64),)
    if component == "vae_decoder":
        return (zeros(IMAGES, spec.autoencoder.embed_dim, HEIGHT, WIDTH),)
    inputs = (zeros(ROWS, spec.unet.in_channels, HEIGHT, WIDTH), zeros(ROWS))
    if spec.unet.context_dim is None:
        return inputs
    return (*inputs, zeros(ROWS, tokens, spec.unet.context_dim))


@pytest.mark.parametrize("name", NAMES)
def test_the_work_of_every_network_is_what_torch_counts(name):
    spec = random_checkpoints.as_spec(narrowed(MODELS[name]))

    counted = network_work(spec, HEIGHT, WIDTH, IMAGES, ROWS)

    present = {
        "text_encoder": spec.networks.get("text_encoder"),
        "unet": spec.unet,
        "vae_decoder": True,
    }
    assert list(counted) == [component for component in COUNTED if present[component]]
    for component, work in counted.items():
        network = build_network(component, spec)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            network(*inputs_of(component, spec))
        assert work.flops == counter.get_total_flops(), component
        assert work.parameters == sum(each.numel() for each in network.parameters()), component


def test_the_work_of_an_image_encoder_is_what_torch_counts():
    spec = VARIATION.network(ImageEncoderSpec)
    network = build_network("image_encoder", VARIATION)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(zeros(1, 3, spec.image_size, spec.image_size))

    work = image_encoder_work(spec)

    assert work.flops == counter.get_total_flops()
    assert work.parameters == sum(each.numel() for each in network.parameters())
    assert network_work(VARIATION, HEIGHT, WIDTH, IMAGES, ROWS)["image_encoder"] == work
