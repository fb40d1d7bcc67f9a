from pathlib import Path

import numpy as np
import onnxruntime

from ldm_runtime.backends import BACKENDS, BackendEntry
from ldm_runtime.backends.onnxruntime.packages import conflict
from ldm_runtime.diagnostics.doctor import diagnose


def test_this_machine_is_described():
    diagnosis = diagnose()

    assert diagnosis.numpy == np.__version__
    assert diagnosis.processors >= 1
    assert [backend.name for backend in diagnosis.backends] == list(BACKENDS)


def test_a_backend_that_can_run_has_a_version_and_no_reason():
    (report,) = diagnose({"onnxruntime": BACKENDS["onnxruntime"]}).backends

    assert report.version == onnxruntime.__version__
    assert report.why_not is None
    assert diagnose().can_run


def test_a_backend_that_cannot_run_says_why_and_what_to_do():
    diagnosis = diagnose({"fast": BackendEntry(module="module_that_is_not_there", extra="faster")})

    assert "install the extra 'faster' of ldm-deploy" in str(diagnosis.backends[0].why_not)
    assert diagnosis.backends[0].version is None
    assert not diagnosis.can_run


def test_two_packages_of_onnx_runtime_are_a_problem_with_a_remedy():
    packages = {"onnxruntime": "1.31.0", "onnxruntime-gpu": "1.31.1"}

    assert diagnose(packages={"onnxruntime": "1.31.1"}).problem is None
    problem = str(diagnose(packages=packages).problem)

    assert "onnxruntime 1.31.0 and onnxruntime-gpu 1.31.1" in problem
    assert "overwrite each other's files" in problem
    assert "`pip install onnxruntime-gpu`" in problem


def test_two_packages_of_onnx_runtime_in_different_folders_overwrite_nothing():
    versions = {"onnxruntime": "1.31.0", "onnxruntime-gpu": "1.31.1"}
    folders = {"onnxruntime": Path("/system"), "onnxruntime-gpu": Path("/venv")}

    problem = str(conflict(versions, folders.get))

    assert "onnxruntime 1.31.0 in /system and onnxruntime-gpu 1.31.1 in /venv" in problem
    assert "Python imports the one that comes first on sys.path" in problem
    assert "overwrite" not in problem
