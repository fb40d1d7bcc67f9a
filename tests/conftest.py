"""Fixtures that several folders of tests share: checkpoints and the bundles made of them.

They import torch only when asked for, because tests/runtime also runs where there is none. An
export takes half a minute; a test that asks for a bundle is slow.
"""

import os
from pathlib import Path

import pytest

SHAPES_CHECKPOINT = Path(__file__).parents[1] / "models/shapes/shapes.ckpt"

os.environ["HF_HUB_OFFLINE"] = "1"  # read when a test module imports huggingface_hub


@pytest.fixture(scope="session")
def small_checkpoint_path(tmp_path_factory):
    """A random Stable Diffusion of small channels in the CompVis layout; do not change it."""
    from tests.export.small_checkpoint import random_networks, write_checkpoint

    folder = tmp_path_factory.mktemp("checkpoint")
    return write_checkpoint(folder / "small.ckpt", random_networks())


@pytest.fixture(scope="session")
def small_bundle_fp32(small_checkpoint_path, tmp_path_factory):
    """The bundle of the small checkpoint, weights stored in float32; do not change it."""
    return _export(small_checkpoint_path, tmp_path_factory.mktemp("fp32") / "engines", "float32")


@pytest.fixture(scope="session")
def small_bundle_fp16(small_checkpoint_path, tmp_path_factory):
    """The bundle of the small checkpoint, weights stored in float16; do not change it."""
    return _export(small_checkpoint_path, tmp_path_factory.mktemp("fp16") / "engines", "float16")


@pytest.fixture(scope="session")
def shapes_bundle(tmp_path_factory):
    """The bundle of the shapes model, with engines of TensorRT for RTX; do not change it."""
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    from ldm_export import export
    from ldm_runtime.engine_recipes import EngineOptions

    bundle = tmp_path_factory.mktemp("shapes") / "engines"
    export(SHAPES_CHECKPOINT, bundle, engines=EngineOptions(builder="tensorrt_rtx"))
    return bundle


def _export(checkpoint, out, weights_dtype):
    from ldm_export import export
    from ldm_export.families import Overrides
    from tests.export.small_checkpoint import SIZE

    overrides = Overrides(height=SIZE, width=SIZE)
    export(checkpoint, out, overrides=overrides, weights_dtype=weights_dtype)
    return out
