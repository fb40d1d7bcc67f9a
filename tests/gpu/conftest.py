"""What the tests on a real GPU share: the reason to skip them, and a bundle with engines."""

import shutil
from pathlib import Path

import pytest

from ldm_runtime.engines.gpu import find_gpu

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """Skip every test of this folder that needs a GPU where there is none."""
    if find_gpu() is not None:
        return
    skip = pytest.mark.skip(reason="no NVIDIA GPU, or no driver for it")
    for item in items:
        if item.path.is_relative_to(_HERE) and item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def engine_bundle(small_bundle_fp16, tmp_path_factory):
    """A bundle with engines for this machine; do not change it."""
    return build_engines(small_bundle_fp16, tmp_path_factory.mktemp("built") / "engines")


def build_engines(bundle, folder, **options):
    """Copy a bundle and build engines in it; skip the test where no builder runs."""
    from ldm_runtime.engines.build_specs import EngineOptions, choose_toolchain
    from ldm_runtime.engines.store import add_engines
    from ldm_runtime.errors import EngineBuildError

    wanted = EngineOptions(**options)
    try:
        toolchain = choose_toolchain(wanted)
    except EngineBuildError as error:
        pytest.skip(str(error))
    if isinstance(toolchain, str):
        pytest.skip(toolchain)
    shutil.copytree(bundle, folder)
    add_engines(folder, wanted)
    return folder
