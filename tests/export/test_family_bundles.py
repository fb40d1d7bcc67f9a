"""Families whose networks or noise no other has, as bundles: exported, and verified without torch.

That their images are those of diffusers is tested next to its pipelines, and that every task
becomes a bundle in `test_task_bundles.py`.
"""

from dataclasses import replace

import pytest
import torch

from ldm_export import export
from ldm_export.detection.overrides import Overrides
from ldm_runtime import Generator
from ldm_runtime.bundle.manifest import load_manifest
from ldm_runtime.diagnostics.verify import verify
from tests.export.small_checkpoint import SIZE, TEXT_ENCODER
from tests.reference.small_families import PLAYGROUND, SD_1, X4_UPSCALER, state_dict
from tests.reference.small_pipelines import PROMPT, photo

#: With narrower text encoders than diffusers' loader must have.
_FIRST, _SECOND = PLAYGROUND.text_encoders
_OPENCLIP = replace(PLAYGROUND.text_encoders[_SECOND], width=64, num_heads=1, pooled_dim=64)
_NARROW = replace(
    PLAYGROUND,
    unet=replace(
        PLAYGROUND.unet,
        context_dim=128,
        transformer_depth=(0, 1),
        middle_depth=1,
        vector_dim=64 + 6 * 256,
    ),
    text_encoders={
        _FIRST: replace(TEXT_ENCODER, num_layers=3, context_layers=2, final_norm=False),
        _SECOND: replace(_OPENCLIP, feed_forward_dim=256),
    },
)
FAMILIES = {
    "playground-v2.5": (_NARROW, {}),
    "stable-diffusion-1-lcm": (replace(SD_1, unet=replace(SD_1.unet, guidance_dim=32)), {}),
    "stable-diffusion-x4-upscaler": (X4_UPSCALER, {"image": photo()[0].resize((16, 16))}),
}


@pytest.mark.slow
@pytest.mark.usefixtures("kept_traces")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_becomes_a_bundle_that_keeps_its_promises(name, tmp_path):
    family, given = FAMILIES[name]
    checkpoint, bundle = tmp_path / "random.ckpt", tmp_path / "engines"
    torch.save({"state_dict": state_dict(family)}, checkpoint)

    export(
        checkpoint,
        bundle,
        overrides=Overrides(height=SIZE, width=SIZE),
        weights_dtype="float32",
        fp16=False,
    )

    manifest = load_manifest(bundle)
    assert (manifest.spec.family, manifest.spec.unet) == (name, family.unet)
    assert manifest.golden
    checks = list(verify(bundle))
    assert [check for check in checks if not check.passed] == []
    assert {check.subject for check in checks} >= {each.name for each in manifest.components}
    with Generator(bundle, threads=1) as generator:
        result = generator(PROMPT, seed=1, num_inference_steps=2, **given)
    assert result.image.size == (SIZE, SIZE)
