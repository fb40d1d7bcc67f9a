"""Every name of ONNX Runtime that our source spells exists in the one installed.

Much of it is only reached on a GPU: without this, a misspelling would first fail there.
"""

import ast
import inspect
import re
from pathlib import Path

import onnxruntime
import pytest
from onnxruntime.capi import onnxruntime_inference_collection as collection

import ldm_runtime

SOURCES = sorted((Path(ldm_runtime.__file__).parent / "backends/onnxruntime").glob("*.py"))

# What our variables hold. A variable that may hold one of ONNX Runtime's objects belongs here.
TYPES = {
    "session": onnxruntime.InferenceSession,
    "_session": onnxruntime.InferenceSession,
    "run_options": onnxruntime.RunOptions,
    "session_options": onnxruntime.SessionOptions,
    "binding": onnxruntime.IOBinding,
    "value": onnxruntime.OrtValue,
    "device": onnxruntime.OrtEpDevice,
    "subgraph": onnxruntime.OrtEpAssignedSubgraph,
    "node": onnxruntime.OrtEpAssignedNode,
}
# Where the same name holds something of ours.
OURS = {("device.py", "_session")}
# Keyword arguments that a session takes as **kwargs, and so shows in its text only.
HIDDEN = {"enable_fallback"}


def trees():
    return [(path.name, ast.parse(path.read_text())) for path in SOURCES]


def module_names():
    """Attributes of the module itself, as `onnxruntime.X` or `onnxruntime.X.y`."""
    for file, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                dotted = ast.unparse(node)
                if re.fullmatch(r"onnxruntime(\.\w+)+", dotted):
                    yield file, dotted


def object_names():
    """Attributes of variables that hold ONNX Runtime's objects, with the class of those."""
    for file, tree in trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            base = node.value
            name = base.id if isinstance(base, ast.Name) else getattr(base, "attr", None)
            if name in TYPES and (file, name) not in OURS:
                yield file, TYPES[name], node.attr


def calls_with_keywords():
    for file, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.keywords:
                dotted = ast.unparse(node.func)
                if dotted.startswith("onnxruntime."):
                    yield file, dotted, [keyword.arg for keyword in node.keywords]


def resolve(dotted):
    found = onnxruntime
    for name in dotted.split(".")[1:]:
        found = getattr(found, name)
    return found


@pytest.mark.parametrize(("file", "dotted"), sorted(set(module_names())))
def test_a_name_of_the_module_exists(file, dotted):
    assert resolve(dotted) is not None, f"{file} spells {dotted}"


@pytest.mark.parametrize(
    ("file", "held", "name"),
    sorted(set(object_names()), key=lambda each: (each[0], each[1].__name__, each[2])),
)
def test_an_attribute_of_an_object_exists(file, held, name):
    assert hasattr(held, name), f"{file} spells {held.__name__}.{name}"


@pytest.mark.parametrize(("file", "dotted", "keywords"), list(calls_with_keywords()))
def test_a_keyword_is_taken(file, dotted, keywords):
    parameters = inspect.signature(resolve(dotted)).parameters

    for keyword in keywords:
        known = keyword in parameters or (
            keyword in HIDDEN and f'"{keyword}"' in inspect.getsource(collection.InferenceSession)
        )
        assert known, f"{file} passes {keyword} to {dotted}"


def test_the_walk_finds_what_only_a_gpu_reaches():
    found = {name for _, _, name in object_names()} | {name for _, name in module_names()}

    assert {
        "onnxruntime.preload_dlls",
        "onnxruntime.register_execution_provider_library",
        "run_with_iobinding",
        "release_captured_graph",
        "add_provider_for_devices",
        "update_inplace",
        "ep_name",
        "op_type",
    } <= found
    assert ("enable_fallback",) in {(key,) for _, _, keys in calls_with_keywords() for key in keys}


@pytest.mark.parametrize(
    "key",
    ["session.record_ep_graph_assignment_info", "gpu_graph_id", "session.set_denormal_as_zero"],
)
def test_a_configuration_key_that_we_spell_is_one_that_the_library_knows(key):
    assert any(f'"{key}"' in path.read_text() for path in SOURCES)
    library = Path(onnxruntime.__file__).parent / "capi"
    (native,) = library.glob("onnxruntime_pybind11_state*")

    assert key.encode() in native.read_bytes()
