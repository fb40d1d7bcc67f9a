"""A bundle's tiny decoder against the `AutoencoderTiny` of diffusers that it was exported from."""

import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from ldm_export import export
from ldm_export.detection.overrides import Overrides
from ldm_export.errors import CheckpointError, WeightsError
from ldm_export.intake.opening import open_model
from ldm_export.source import ExportOptions, open_checkpoint_of, open_source
from ldm_runtime import Generator
from ldm_runtime.diagnostics.verify import verify
from ldm_runtime.errors import RequestError
from tests.export.small_checkpoint import SIZE, randomise

PROMPT = "a large red circle left of a small blue square on a white background"
CHANNELS = 16


def tiny_autoencoder(levels=3, **fields):
    """Return a random TAESD; the small checkpoint's latents have a factor of 4."""
    torch.manual_seed(0)
    network = AutoencoderTiny(
        encoder_block_out_channels=levels * (CHANNELS,),
        decoder_block_out_channels=levels * (CHANNELS,),
        num_encoder_blocks=(1, *(levels - 1) * (3,)),
        num_decoder_blocks=(*(levels - 1) * (3,), 1),
        **fields,
    )
    randomise(network)
    return network


@pytest.fixture(scope="module")
def network():
    return tiny_autoencoder()


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("taesd")
    network.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def generator(small_checkpoint_path, folder, tmp_path_factory, traces):
    out = tmp_path_factory.mktemp("bundle") / "engines"
    with traces.kept():
        export(
            small_checkpoint_path,
            out,
            tiny_decoder=folder,
            weights_dtype="float32",
            overrides=Overrides(height=SIZE, width=SIZE),
        )
    with Generator(out) as opened:
        yield opened


def in_own_names(folder, prefix):
    """Return the decoder's tensors as TAESD's own file names them, which counts the clamp."""
    numbered = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
    found = {
        numbered.fullmatch(name): tensor
        for name, tensor in load_file(folder / "diffusion_pytorch_model.safetensors").items()
    }
    return {
        f"{prefix}{int(match[1]) + 1}.{match[2]}": tensor
        for match, tensor in found.items()
        if match
    }


def assert_decoded_by(network, latents, images):
    with torch.no_grad():
        theirs = network.decode(torch.from_numpy(latents)).sample.clamp(-1, 1).numpy()
    expected = 127.5 * (theirs.transpose(0, 2, 3, 1) + 1)
    assert expected.std() > 20
    for image, pixels in zip(images, expected, strict=True):
        assert np.abs(np.asarray(image, dtype=np.float64) - pixels).max() <= 0.51  # rounding


def test_images_are_those_that_diffusers_decodes(generator, network):
    fields = {"num_inference_steps": 3, "seed": 7, "num_images": 2}

    tiny = generator(PROMPT, decoder="tiny", **fields)
    full = generator(PROMPT, **fields)

    np.testing.assert_array_equal(tiny.latents, full.latents)
    assert_decoded_by(network, tiny.latents, tiny.images)
    assert_decoded_by(network, tiny.latents, generator.decode(tiny.latents, decoder="tiny"))
    with pytest.raises(AssertionError):
        assert_decoded_by(network, full.latents, full.images)
    assert tiny.timings.keys() - full.timings.keys() == {"tiny_decoder"}


def test_an_image_says_which_decoder_made_it(generator):
    result = generator(PROMPT, decoder="tiny", num_inference_steps=2, seed=1)

    again = generator(result.request.as_request())

    assert result.request.as_request().decoder == "tiny"
    assert again.image.tobytes() == result.image.tobytes()


def test_verify_compares_the_tiny_decoder_with_torch(generator):
    checks = [check for check in verify(generator.bundle) if check.subject == "tiny_decoder"]

    assert checks
    assert all(check.value < 1e-4 for check in checks)


@pytest.mark.parametrize("prefix", ["", "decoder.", "taesd_decoder."])
def test_its_own_names_are_read(small_checkpoint_path, folder, tmp_path, prefix):
    file = tmp_path / "taesd_decoder.safetensors"
    save_file(in_own_names(folder, prefix), file)

    with (
        open_model(small_checkpoint_path, tiny_decoder=file) as mine,
        open_model(small_checkpoint_path, tiny_decoder=folder) as theirs,
    ):
        assert mine.tensors.keys() == theirs.tensors.keys()
        for name in mine.tensors:
            np.testing.assert_array_equal(mine.tensors[name].numpy(), theirs.tensors[name].numpy())


def test_a_decoder_of_other_latents_is_refused(small_checkpoint_path, tmp_path):
    for levels, fields, message in (
        (4, {}, r"8 pixels per latent pixel and the model's own 4"),
        (3, {"latent_channels": 16}, r"16 channels of latents and the model's own 4"),
    ):
        folder = tmp_path / str(levels)
        tiny_autoencoder(levels, **fields).save_pretrained(folder)
        options = ExportOptions(
            checkpoint=small_checkpoint_path, out=tmp_path / "out", tiny_decoder=folder
        )
        with open_checkpoint_of(options) as checkpoint, pytest.raises(WeightsError, match=message):
            open_source(options, checkpoint, hashed=False)


def test_another_file_is_no_tiny_decoder(small_checkpoint_path, tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({"post_quant_conv.weight": torch.ones(4, 4, 1, 1)}, file)

    with pytest.raises(CheckpointError, match="no decoder of TAESD"):
        open_model(small_checkpoint_path, tiny_decoder=file)


def test_a_bundle_without_says_how_to_get_one(small_bundle_fp32):
    with (
        Generator(small_bundle_fp32) as generator,
        pytest.raises(RequestError, match="export the checkpoint again with --tiny-decoder"),
    ):
        generator(PROMPT, decoder="tiny")
