"""A model that varies images: from its checkpoint to images, by the commands that a user types."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_export.cli import main as ldm_export
from ldm_runtime.bundle.manifest import load_manifest
from ldm_runtime.cli.commands import main as ldm
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.pipeline.image_files import read_metadata
from tests.reference.small_families import UNCLIP_H, state_dict

pytestmark = pytest.mark.slow


def test_a_checkpoint_becomes_a_bundle_that_varies_images(tmp_path, capsys):
    checkpoint, bundle, photo = (tmp_path / name for name in ("unclip.ckpt", "engines", "a.png"))
    torch.save({"state_dict": state_dict(UNCLIP_H)}, checkpoint)
    rows, columns = np.mgrid[:40, :72]
    pixels = np.stack([rows * 6, columns * 3, rows * columns % 256], axis=2).astype(np.uint8)
    Image.fromarray(pixels).save(photo)
    size = ("--height", "64", "--width", "64")

    assert ldm_export([str(checkpoint), str(bundle), "--engines", "none", *size]) == 0
    said = capsys.readouterr().err
    assert ldm(["verify", str(bundle)]) == 0
    assert ldm(["inspect", str(checkpoint)]) == 0
    described = capsys.readouterr().out
    images = ["generate", "--image", str(photo), "--noise-level", "100", "-n", "2"]
    saved = [
        "--seed",
        "3",
        "--steps",
        "4",
        "--bundle",
        str(bundle),
        "-o",
        str(tmp_path / "b{index}.png"),
    ]
    assert ldm([*images, *saved]) == 0

    assert f"next: ldm generate --image photo.png --bundle {bundle}" in said
    assert "image-variation" in described
    manifest = load_manifest(bundle)
    assert manifest.spec.family == "stable-diffusion-2-unclip-h"
    names = [each.name for each in manifest.components]
    assert names == ["text_encoder", "image_encoder", "unet", "vae_decoder", "vae_encoder"]
    paths = sorted(tmp_path.glob("b*.png"))
    assert [each.size for each in map(InputImage.read, paths)] == [(64, 64), (64, 64)]
    assert {read_metadata(path)["request"]["noise_level"] for path in paths} == {100}
    first, second = (InputImage.read(path).pixels.astype(np.float64) for path in paths)
    assert first.std() > 5
    assert np.abs(first - second).mean() > 1
