"""Fixtures that several folders of tests share: checkpoints and the bundles made of them.

They import torch only when asked for, because tests/runtime also runs where there is none. An
export takes half a minute; a test that asks for a bundle is slow.
"""

import logging
import os
import tempfile
from pathlib import Path

import pytest

SHAPES_CHECKPOINT = Path(__file__).parents[1] / "models/shapes/shapes.ckpt"

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have what the process that starts them has
    # Engines that tests build are trusted by the tests alone.
    _CACHE = tempfile.TemporaryDirectory(prefix="ldm-tests-")
    os.environ["XDG_CACHE_HOME"] = _CACHE.name
# What runs by itself must not depend on what is installed; tests of other backends name them.
os.environ["LDM_BACKEND"] = "onnxruntime"
os.environ["HF_HUB_OFFLINE"] = "1"  # read when a test module imports huggingface_hub
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when one imports onnxruntime


def pytest_addoption(parser):
    parser.addoption(
        "--no-sockets",
        action="store_true",
        help="on Linux, let no test open an internet socket",
    )
    parser.addoption(
        "--families",
        type=Path,
        metavar="FILE",
        help="append to FILE how far the images of each family are from a reference's",
    )
    parser.addoption(
        "--graphs",
        action="store_true",
        help="compare families through their ONNX graphs, too: half a minute each",
    )


def pytest_configure(config):
    from tests.runtime.sockets import can_forbid_sockets, forbid_sockets

    if config.getoption("--no-sockets") and can_forbid_sockets():
        forbid_sockets(kill=False)  # all processes that tests start inherit it


@pytest.fixture(autouse=True)
def _untouched_levels():
    """Let no test read other messages because one before it ran a command, which sets levels."""
    for name in ("ldm_export", "ldm_runtime", "ldm_serve"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def small_checkpoint_path(tmp_path_factory):
    """A random Stable Diffusion of small channels in the CompVis layout; do not change it."""

    def make(folder):
        from tests.export.small_checkpoint import random_networks, write_checkpoint

        write_checkpoint(folder / "small.ckpt", random_networks())

    return _made_once(tmp_path_factory, "checkpoint", make) / "small.ckpt"


@pytest.fixture(scope="session")
def traces():
    """The traces that a process keeps for all tests which export; see `tests.export.traces`."""
    from tests.export.traces import Traces

    return Traces()


@pytest.fixture
def kept_traces(traces):
    """Let the exports of one test trace no graph that an earlier test traced."""
    with traces.kept():
        yield


@pytest.fixture(scope="session")
def small_bundle_fp32(small_checkpoint_path, tmp_path_factory, traces):
    """The bundle of the small checkpoint, weights stored in float32; do not change it."""
    with traces.kept():
        return _small_bundle(small_checkpoint_path, tmp_path_factory, "float32")


@pytest.fixture(scope="session")
def small_bundle_fp16(small_checkpoint_path, tmp_path_factory, traces):
    """The bundle of the small checkpoint, weights stored in float16; do not change it."""
    with traces.kept():
        return _small_bundle(small_checkpoint_path, tmp_path_factory, "float16")


@pytest.fixture(scope="session")
def shapes_bundle(tmp_path_factory):
    """The bundle of the shapes model, with engines of TensorRT for RTX; do not change it."""
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")

    def make(folder):
        from ldm_export import export
        from ldm_runtime.engines.build_specs import EngineOptions

        engines = EngineOptions(builder="tensorrt_rtx")
        export(SHAPES_CHECKPOINT, folder / "engines", engines=engines)

    return _made_once(tmp_path_factory, "shapes", make) / "engines"


def _small_bundle(checkpoint, tmp_path_factory, weights_dtype):
    def make(folder):
        from ldm_export import export
        from ldm_export.detection.overrides import Overrides
        from tests.export.small_checkpoint import SIZE

        overrides = Overrides(height=SIZE, width=SIZE)
        export(checkpoint, folder / "engines", overrides=overrides, weights_dtype=weights_dtype)

    return _made_once(tmp_path_factory, weights_dtype, make) / "engines"


def _made_once(tmp_path_factory, name, make):
    """Return a folder that `make` filled, by whichever of pytest-xdist's workers came first."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tmp_path_factory.mktemp(name)
        make(folder)
        return folder
    from filelock import FileLock

    folder = tmp_path_factory.getbasetemp().parent / name  # of all workers of this run
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = folder.with_name(f"{name}.partial")
            partial.mkdir(exist_ok=True)
            make(partial)
            partial.rename(folder)
    return folder
