import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.bundle.manifest import FileRecord, encode_manifest, load_manifest
from ldm_runtime.diagnostics.measures import max_relative_error, psnr, relative_l2
from ldm_runtime.diagnostics.verify import Check, verify
from ldm_runtime.errors import BackendError, BundleError


def rewrite(bundle, **changes):
    """Record the files of a bundle as they now are."""
    manifest = dataclasses.replace(load_manifest(bundle), **changes)
    files = tuple(
        FileRecord(
            path=record.path,
            sha256=sha256_of(bundle / record.path),
            size_bytes=(bundle / record.path).stat().st_size,
        )
        for record in manifest.files
        if (bundle / record.path).exists()
    )
    manifest = dataclasses.replace(manifest, files=files)
    (bundle / "manifest.json").write_bytes(encode_manifest(manifest))


def missed(bundle):
    return [(check.subject, check.measure) for check in verify(bundle) if not check.passed]


def change_arrays(path: Path, **changes):
    with np.load(path) as file:
        arrays = {key: changes.get(key, lambda array: array)(file[key]) for key in file}
    np.savez(path, **arrays)


def test_an_intact_bundle_keeps_every_promise(tiny_bundle, caplog):
    checks = list(verify(tiny_bundle))

    assert caplog.records == []
    assert all(check.passed for check in checks)
    assert {check.subject for check in checks} == {
        "text_encoder",
        "unet",
        "vae_decoder",
        "vae_encoder",
        "golden/0 latents",
        "golden/0 image 0",
        "golden/0 image 1",
        "golden/1 latents",
        "golden/1 image 0",
    }
    assert {check.bound for check in checks if check.measure == "psnr"} == {60.0}
    assert {check.bound for check in checks if check.measure == "max_relative_error"} == {1e-4}


def test_a_component_that_computes_something_else_misses_its_bound(own_bundle):
    graph_of_weights = own_bundle / "vae_decoder/weights.bin"
    weights = np.frombuffer(graph_of_weights.read_bytes(), dtype=np.float32)
    graph_of_weights.write_bytes((weights * 1.01).tobytes())
    rewrite(own_bundle)

    found = missed(own_bundle)

    assert ("vae_decoder", "max_relative_error") in found
    assert ("golden/0 image 0", "psnr") in found
    assert not [subject for subject, _ in found if subject in {"unet", "text_encoder"}]


def test_a_network_that_answers_nan_misses_its_bounds_and_ends_the_verification(own_bundle):
    weights = own_bundle / "vae_decoder/weights.bin"
    weights.write_bytes(np.full(weights.stat().st_size // 4, np.nan, dtype=np.float32).tobytes())
    rewrite(own_bundle)
    checks = verify(own_bundle)

    found = []
    with pytest.raises(BackendError, match="vae_decoder produced NaN or infinity"):
        found.extend(check for check in checks)

    assert [check.subject for check in found if not check.passed] == ["vae_decoder"] * 2


def test_a_picture_that_differs_misses_its_bound(own_bundle):
    path = own_bundle / "golden/0/1.png"
    with Image.open(path) as image:
        pixels = np.asarray(image).copy()
    pixels[0, 0, 0] ^= 64
    Image.fromarray(pixels).save(path)
    rewrite(own_bundle)

    assert missed(own_bundle) == [("golden/0 image 1", "psnr")]


def test_fp16_weights_are_held_to_the_looser_bounds(own_bundle):
    for name in ("unet", "vae_decoder"):
        output = {"unet": "out.prediction", "vae_decoder": "out.image"}[name]
        factor = {"unet": 1.004, "vae_decoder": 1.006}[name]
        change_arrays(
            own_bundle / f"golden/components/{name}.npz",
            **{output: lambda array, factor=factor: array * factor},
        )
    rewrite(own_bundle, weights_dtype="float16")

    checks = list(verify(own_bundle))

    assert [check.subject for check in checks if not check.passed] == ["vae_decoder"]
    assert {check.bound for check in checks if check.measure == "psnr"} == {35.0}
    assert {check.bound for check in checks if check.measure == "max_relative_error"} == {None}


def test_a_network_that_ignores_its_inputs_is_a_warning_though_it_keeps_its_promises(
    own_bundle, caplog
):
    weights = own_bundle / "unet/weights.bin"
    weights.write_bytes(bytes(weights.stat().st_size))
    change_arrays(
        own_bundle / "golden/components/unet.npz", **{"out.prediction": lambda array: 0 * array}
    )
    rewrite(own_bundle)

    found = [check for check in verify(own_bundle) if check.subject == "unet"]

    assert all(check.passed for check in found)
    assert "output of the unet does not depend on its latents and timesteps and" in caplog.text


def test_nan_keeps_no_promise(own_bundle):
    change_arrays(
        own_bundle / "golden/components/unet.npz",
        **{"out.prediction": lambda array: np.full_like(array, np.nan)},
    )
    rewrite(own_bundle)

    assert ("unet", "max_relative_error") in missed(own_bundle)
    assert ("unet", "relative_l2") in missed(own_bundle)


def test_every_file_of_the_bundle_is_checked_first(own_bundle):
    path = own_bundle / "vae_encoder/weights.bin"
    path.write_bytes(path.read_bytes()[::-1])

    with pytest.raises(BundleError, match=r"vae_encoder/weights\.bin has sha256"):
        next(verify(own_bundle))


def test_a_bundle_without_golden_outputs_cannot_be_verified(own_bundle):
    rewrite(own_bundle, golden=())

    with pytest.raises(BundleError, match="no golden outputs"):
        list(verify(own_bundle))


@pytest.mark.parametrize(
    "path",
    [
        "golden/0/request.json",
        "golden/0/golden.npz",
        "golden/0/0.png",
        "golden/components/unet.npz",
    ],
)
@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_golden_file_that_is_missing_or_malformed_is_one_sentence(own_bundle, path, content):
    (own_bundle / path).unlink()
    if content is not None:
        (own_bundle / path).write_bytes(content)
    rewrite(own_bundle)

    with pytest.raises(BundleError, match=path.rpartition("/")[2]):
        list(verify(own_bundle))


def test_a_golden_output_of_another_shape_is_an_error(own_bundle):
    change_arrays(own_bundle / "golden/0/golden.npz", latents=lambda array: array[:1])
    rewrite(own_bundle)

    with pytest.raises(BundleError, match=r"shape \(1, 4, 8, 8\), .* \(2, 4, 8, 8\)"):
        list(verify(own_bundle))


def test_a_golden_array_that_is_missing_is_an_error(own_bundle):
    path = own_bundle / "golden/components/unet.npz"
    with np.load(path) as file:
        arrays = {key: file[key] for key in file if key != "out.prediction"}
    np.savez(path, **arrays)
    rewrite(own_bundle)

    with pytest.raises(BundleError, match=r"unet\.npz is malformed: 'out\.prediction'"):
        list(verify(own_bundle))


def test_the_backend_can_be_named(tiny_bundle):
    with pytest.raises(BackendError, match="unknown backend 'abacus'"):
        next(verify(tiny_bundle, backend="abacus"))


def test_the_measures_have_their_textbook_values():
    expected = np.array([3.0, -4.0], dtype=np.float32)
    actual = np.array([3.0, -3.0], dtype=np.float32)
    grey, other = np.full((2, 2, 3), 100, np.uint8), np.full((2, 2, 3), 101, np.uint8)

    assert max_relative_error(actual, expected) == 1 / 4
    assert relative_l2(actual, expected) == 1 / 5
    assert max_relative_error(expected * 0, expected * 0) == 0
    assert relative_l2(expected, expected * 0) == math.inf
    assert psnr(grey, other) == psnr(other, grey) == pytest.approx(48.13, abs=0.005)
    assert psnr(grey, grey) == math.inf


@pytest.mark.parametrize(
    ("measure", "value", "bound", "passed"),
    [
        ("psnr", 60.0, 60.0, True),
        ("psnr", 59.9, 60.0, False),
        ("relative_l2", 5e-3, 5e-3, True),
        ("relative_l2", 6e-3, 5e-3, False),
        ("relative_l2", math.nan, 5e-3, False),
        ("relative_l2", 9.0, None, True),
        ("relative_l2", math.nan, None, False),
    ],
)
def test_a_check_passes_on_the_right_side_of_its_bound(measure, value, bound, passed):
    assert Check(subject="unet", measure=measure, value=value, bound=bound).passed is passed
