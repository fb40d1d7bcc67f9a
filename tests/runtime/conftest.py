"""Fixtures of the runtime's tests: the tiny bundle."""

import shutil

import pytest

from ldm_runtime.testing import write_tiny_bundle


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory):
    """A tiny bundle that no test may change."""
    folder = tmp_path_factory.mktemp("tiny") / "engines"
    write_tiny_bundle(folder)
    return folder


@pytest.fixture
def own_bundle(tiny_bundle, tmp_path):
    """A copy of the tiny bundle for one test to spoil."""
    return shutil.copytree(tiny_bundle, tmp_path / "engines")
