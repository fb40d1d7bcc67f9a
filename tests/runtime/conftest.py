"""Fixtures of the runtime's tests: the tiny bundles."""

import shutil

import pytest

from ldm_runtime.testing import write_tiny_bundle


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory):
    """A tiny bundle that no test may change."""
    folder = tmp_path_factory.mktemp("tiny") / "engines"
    write_tiny_bundle(folder)
    return folder


@pytest.fixture(scope="session")
def bundle_of(tiny_bundle, tmp_path_factory):
    """Returns the tiny bundle of a task, written when first asked for; none may be changed."""
    folders = {"text-to-image": tiny_bundle}

    def find(task):
        if task not in folders:
            folder = tmp_path_factory.mktemp(task) / "engines"
            write_tiny_bundle(folder, task)
            folders[task] = folder
        return folders[task]

    return find


@pytest.fixture
def free_choice(monkeypatch):
    """Let "auto" choose a backend, which tests fix otherwise."""
    monkeypatch.delenv("LDM_BACKEND")


@pytest.fixture
def own_bundle(tiny_bundle, tmp_path):
    """A copy of the tiny bundle for one test to spoil."""
    return shutil.copytree(tiny_bundle, tmp_path / "engines")
