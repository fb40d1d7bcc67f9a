"""Runs that this machine has no memory for are refused before they begin, and no others."""

from dataclasses import replace

import numpy as np
import pytest

from ldm_runtime import Generator
from ldm_runtime.backends import host_memory
from ldm_runtime.errors import BackendError
from ldm_runtime.testing import TINY_SPEC

GIGABYTE = 10**9


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Sets what the system says of its memory: kB, and the limit of a group of processes."""
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "memory.max"
    monkeypatch.setattr(host_memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(host_memory, "_CGROUP", cgroup)

    def say(available=None, swap=0, limit=None):
        if available is not None:
            meminfo.write_text(
                f"MemTotal:  99 kB\nMemAvailable:  {available} kB\nSwapFree: {swap} kB\n"
                "HugePages_Total:  0\n"
            )
        if limit is not None:
            cgroup.write_text(f"{limit}\n")

    return say


@pytest.mark.parametrize(
    ("said", "bytes_free"),
    [
        ({}, float("inf")),
        ({"available": 1000}, 1_024_000),
        ({"available": 1000, "swap": 500}, 1_536_000),
        ({"available": 1000, "limit": "max"}, 1_024_000),
        ({"available": 1000, "limit": 900_000}, 900_000),
        ({"available": 1000, "limit": 2_000_000}, 1_024_000),
    ],
)
def test_what_is_free_is_what_the_system_says_within_the_groups_limit(machine, said, bytes_free):
    machine(**said)

    assert host_memory.available_bytes() == bytes_free


def lengths(**axes):
    return {"batch": 2, **axes}


UNET = replace(
    TINY_SPEC.unet,
    model_channels=64,
    channel_mult=(1, 2, 4),
    transformer_depth=(0, 1, 1),
    num_heads=None,
    num_head_channels=32,
)
AUTOENCODER = replace(
    TINY_SPEC.autoencoder, channels=32, channel_mult=(1, 2, 4), attention_levels=()
)
SPEC = replace(TINY_SPEC, unet=UNET, autoencoder=AUTOENCODER)


@pytest.mark.parametrize(
    ("name", "axes", "values"),
    [
        ("unet", {"height": 4, "width": 4}, 64 * 16),  # few pixels: the features
        ("unet", {"height": 64, "width": 32}, (128 // 32) * (32 * 16) ** 2),  # many: the scores
        ("vae_decoder", {"height": 8, "width": 4}, 32 * 32 * 16),
        ("vae_decoder", {"height": 64, "width": 128}, (64 * 128) ** 2),
        ("vae_encoder", {"image_height": 256, "image_width": 512}, (64 * 128) ** 2),
        ("text_encoder", {"tokens": 77}, 0),
    ],
)
def test_the_largest_tensor_is_features_or_scores(name, axes, values):
    assert host_memory.least_bytes(name, SPEC, lengths(**axes)) == 4 * 2 * values


def test_fixed_heads_and_attention_beside_the_middle_count():
    unet = replace(UNET, transformer_depth=(1, 0, 0), num_heads=8, num_head_channels=None)
    autoencoder = replace(AUTOENCODER, attention_levels=(1,), middle_attention=False)
    spec = replace(SPEC, unet=unet, autoencoder=autoencoder)

    of_unet = host_memory.least_bytes("unet", spec, lengths(height=64, width=64))
    of_decoder = host_memory.least_bytes("vae_decoder", spec, lengths(height=64, width=64))

    assert of_unet == 4 * 2 * 8 * 64**4
    assert of_decoder == 4 * 2 * 128**4
    plain = replace(spec, autoencoder=replace(autoencoder, attention_levels=()))
    features = host_memory.least_bytes("vae_decoder", plain, lengths(height=64, width=64))
    assert features == 4 * 2 * 32 * 256**2


def test_a_run_that_fits_is_let_through_and_a_larger_one_refused(machine):
    machine(available=GIGABYTE // 1024)
    side = 60  # (60 * 60)^2 * 8 bytes of scores in the decoder
    assert host_memory.least_bytes("vae_decoder", SPEC, lengths(height=side, width=side)) < GIGABYTE

    host_memory.check_memory("vae_decoder", SPEC, lengths(height=side, width=side))
    with pytest.raises(
        BackendError,
        match=r"vae_decoder takes at least 33\.3 GB for 2 x 1016x1016 pixels, but 1\.0 GB of "
        r"memory are free; .* \(tile_size\)",
    ):
        host_memory.check_memory("vae_decoder", SPEC, lengths(height=254, width=254))


def test_a_picture_that_cannot_fit_is_refused_and_a_small_one_drawn_afterwards(
    tiny_bundle, machine
):
    machine(available=300_000)
    with Generator(tiny_bundle, backend="onnxruntime") as generator:
        with pytest.raises(BackendError, match=r"at least .* GB for .* pixels, but 0\.3 GB"):
            generator.decode(np.zeros((1, 4, 1024, 1024), dtype=np.float32))
        assert generator.decode(np.zeros((1, 4, 8, 8), dtype=np.float32))[0].size == (16, 16)
