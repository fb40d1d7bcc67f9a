"""The bundle of the checkpoint that comes along, exported once for all tests here."""

from pathlib import Path

import pytest

CHECKPOINT = Path(__file__).parents[2] / "models/shapes/shapes.ckpt"


@pytest.fixture(scope="session")
def shapes_bundle(tmp_path_factory):
    """The bundle of the shapes model, with engines of TensorRT for RTX; do not change it."""
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    from ldm_export import export
    from ldm_runtime.engine_recipes import EngineOptions

    bundle = tmp_path_factory.mktemp("shapes") / "engines"
    export(CHECKPOINT, bundle, engines=EngineOptions(builder="tensorrt_rtx"))
    return bundle
