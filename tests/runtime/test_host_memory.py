"""Runs that this machine has no memory for are refused before they begin, and no others."""

from dataclasses import replace

import numpy as np
import pytest

from ldm_runtime import Generator
from ldm_runtime.backends import host_memory
from ldm_runtime.backends.control_groups import ControlGroups
from ldm_runtime.errors import BackendError
from ldm_runtime.testing import TINY_SPEC

GIGABYTE = 10**9


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Sets what the system says of its memory: kB, and the limit of a group of processes."""
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "memory.max"
    (tmp_path / "cgroup").write_text("0::/\n")
    groups = ControlGroups(root=tmp_path, membership=tmp_path / "cgroup")
    monkeypatch.setattr(host_memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(host_memory, "_GROUPS", groups)

    def say(available=None, swap=0, limit=None):
        if available is not None:
            meminfo.write_text(
                f"MemTotal:  99 kB\nMemAvailable:  {available} kB\nSwapFree: {swap} kB\n"
                "HugePages_Total:  0\nno colon\nNothing:\n"
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
        ({"available": 1000, "swap": 500, "limit": 900_000}, 900_000 + 512_000),
        ({"limit": 900_000}, float("inf")),  # no meminfo: not Linux
    ],
)
def test_what_is_free_is_what_the_system_says_within_the_groups_limit(machine, said, bytes_free):
    machine(**said)

    assert host_memory.available_bytes() == bytes_free


def test_swap_counts_only_if_asked_for(machine):
    machine(available=1000, swap=500)

    assert host_memory.available_bytes(swap=False) == 1_024_000


def test_a_system_that_does_not_say_what_is_available_refuses_nothing(machine):
    host_memory._MEMINFO.write_text("MemTotal: 99 kB\nMemFree: 1 kB\n")

    assert host_memory.available_bytes() == float("inf")


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
SPEC = TINY_SPEC.with_networks(unet=UNET, autoencoder=AUTOENCODER)


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


def test_scores_that_are_never_kept_do_not_count():
    sizes = {"unet": {"height": 64, "width": 32}, "vae_decoder": {"height": 64, "width": 128}}
    features = {"unet": 64 * 64 * 32, "vae_decoder": 32 * 256 * 512}

    found = {
        name: host_memory.least_bytes(name, SPEC, lengths(**axes), keeps_scores=False)
        for name, axes in sizes.items()
    }

    assert found == {name: 4 * 2 * values for name, values in features.items()}


def test_fixed_heads_and_attention_beside_the_middle_count():
    unet = replace(UNET, transformer_depth=(1, 0, 0), num_heads=8, num_head_channels=None)
    autoencoder = replace(AUTOENCODER, attention_levels=(1,), middle_attention=False)
    spec = SPEC.with_networks(unet=unet, autoencoder=autoencoder)

    of_unet = host_memory.least_bytes("unet", spec, lengths(height=64, width=64))
    of_decoder = host_memory.least_bytes("vae_decoder", spec, lengths(height=64, width=64))

    assert of_unet == 4 * 2 * 8 * 64**4
    assert of_decoder == 4 * 2 * 128**4
    plain = spec.with_networks(autoencoder=replace(autoencoder, attention_levels=()))
    features = host_memory.least_bytes("vae_decoder", plain, lengths(height=64, width=64))
    assert features == 4 * 2 * 32 * 256**2


def test_attention_in_the_middle_alone_counts():
    unet = replace(UNET, transformer_depth=(0, 0, 0), middle_depth=1, num_heads=8)

    found = host_memory.least_bytes(
        "unet", SPEC.with_networks(unet=unet), lengths(height=64, width=64)
    )

    assert found == 4 * 2 * 8 * 16**4


def test_attention_on_the_way_up_alone_counts_and_a_middle_without_any_does_not():
    unet = replace(UNET, transformer_depth=(0, 0, 0), middle_depth=0, num_heads=8)
    upwards = replace(unet, output_depth=(0, (0, 2), 0))

    without, found = (
        host_memory.least_bytes("unet", SPEC.with_networks(unet=each), lengths(height=64, width=64))
        for each in (unet, upwards)
    )

    assert without == 4 * 2 * 64 * 64**2
    assert found == 4 * 2 * 8 * 32**4


def test_a_run_that_fits_is_let_through_and_a_larger_one_refused(machine):
    machine(available=GIGABYTE // 1024)
    small, large = lengths(height=60, width=60), lengths(height=254, width=127)

    taken = host_memory.check_memory("vae_decoder", SPEC, small)

    assert taken == 4 * 2 * 60**4
    with pytest.raises(
        BackendError,
        match=r"vae_decoder takes at least 8\.3 GB for 2 times 508x1016 pixels, but there are "
        r"1\.0 GB for it; ask for fewer or smaller images, or for tiles \(tile_size\)",
    ):
        host_memory.check_memory("vae_decoder", SPEC, large)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("unet", SPEC),
        ("vae_encoder", SPEC),
        ("vae_decoder", replace(SPEC, task="super-resolution")),
    ],
)
def test_tiles_are_offered_only_where_there_are_any(name, spec, machine):
    machine(available=1000)
    axes = {"height": 256, "width": 256, "image_height": 1024, "image_width": 1024}

    with pytest.raises(BackendError) as caught:
        host_memory.check_memory(name, spec, lengths(**axes))

    assert str(caught.value).endswith("ask for fewer or smaller images")


def test_what_an_engine_holds_already_need_not_be_free_again(machine):
    machine(available=GIGABYTE // 1024)
    size = lengths(height=60, width=60)
    held = host_memory.check_memory("vae_decoder", SPEC, size)
    machine(available=1000)

    assert host_memory.check_memory("vae_decoder", SPEC, size, held) == held
    with pytest.raises(BackendError):
        host_memory.check_memory("vae_decoder", SPEC, size)


def test_a_picture_that_cannot_fit_is_refused_and_one_that_did_is_drawn_again(
    tiny_bundle, machine, monkeypatch
):
    monkeypatch.setattr(host_memory, "_NEGLIGIBLE_BYTES", 1000)
    with Generator(tiny_bundle, backend="onnxruntime") as generator:
        latents = np.zeros((1, generator.spec.autoencoder.embed_dim, 8, 8), dtype=np.float32)
        machine(available=300_000)
        (first,) = generator.decode(latents)
        machine(available=0)
        (again,) = generator.decode(latents)
        with pytest.raises(BackendError, match=r"GB for 32x16 pixels, but there are 0\.0 GB"):
            generator.decode(np.repeat(latents, 2, axis=3))

    assert first.tobytes() == again.tobytes()
