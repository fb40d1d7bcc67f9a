"""Every name of NVIDIA's that our source uses is looked up in the packages that are installed.

Nothing else can be known of that code without a GPU. Each file below has a table of what its
expressions are; what a call of the vendor's gives must be in the table, under the class that the
vendor's own signature says.
"""

import ast
import ctypes
import inspect
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from ldm_runtime.backends import cuda_device
from ldm_runtime.backends.contract import RunOptions
from ldm_runtime.backends.tensorrt import runtime as tensorrt_runtime
from ldm_runtime.engines import build_specs as engine_recipes
from ldm_runtime.engines import gpu as cuda_driver

trt = pytest.importorskip("tensorrt_rtx")
core = pytest.importorskip("cuda.core")
driver = pytest.importorskip("cuda.bindings.driver")
graph = pytest.importorskip("cuda.core.graph")

FOLDER = Path(inspect.getfile(cuda_driver)).parents[1]

#: What expressions of a file are: the vendor's modules, or instances of the vendor's classes.
TABLES = {
    "engines/library.py": {"module": trt},
    "engines/build.py": {
        "module": trt,
        "builder": trt.Builder,
        "network": trt.INetworkDefinition,
        "parser": trt.OnnxParser,
        "error": trt.ParserError,
        "config": trt.IBuilderConfig,
        "profile": trt.IOptimizationProfile,
        "cache": trt.ITimingCache,
    },
    "backends/tensorrt/runtime.py": {
        "self._library": trt,
        "library": trt,
        "self._runtime": trt.Runtime,
        "self._engine": trt.ICudaEngine,
        "context": trt.IExecutionContext,
        "self._context": trt.IExecutionContext,
        "config": trt.IRuntimeConfig,
        "self._cache": trt.IRuntimeCache,
        "memory": trt.IHostMemory,
    },
    "backends/cuda_device.py": {
        "core": core,
        "self._driver": driver,
        "self._device": core.Device,
        "self._pinned": core.LegacyPinnedMemoryResource,
        "self._stream": core.Stream,
        "buffer": core.Buffer,
        "self._buffer": core.Buffer,
        "builder": graph.GraphBuilder,
        "graph": graph.Graph,
        "self._graph": graph.Graph,
    },
}


class Uses(ast.NodeVisitor):
    """Collects what is wrong with a file's uses of the vendor's names, and how many there are."""

    def __init__(self, table):
        self.table, self.faults, self.seen, self.count = table, [], set(), 0

    def resolve(self, node):
        """Return what an expression is of the vendor's, or None."""
        text = ast.unparse(node)
        if text in self.table:
            self.seen.add(text)
            return self.table[text]
        if isinstance(node, ast.Attribute):
            owner = self.resolve(node.value)
            return None if owner is None else getattr(owner, node.attr, None)
        return None

    def visit_Attribute(self, node):
        owner = self.resolve(node.value)
        if owner is not None and ast.unparse(node) not in self.table:
            self.count += 1
            if not hasattr(owner, node.attr):
                self.fault(node, f"{owner.__name__} has no {node.attr}")
            elif isinstance(node.ctx, ast.Store) and not is_settable(getattr(owner, node.attr)):
                self.fault(node, f"{owner.__name__}.{node.attr} cannot be set")
        self.generic_visit(node)

    def visit_Call(self, node):
        called = self.resolve(node.func)
        if callable(called):
            given = len(node.args), sorted(each.arg for each in node.keywords)
            if not any(accepts(parameters, *given) for parameters, _ in signatures(called)):
                self.fault(node, f"{ast.unparse(node)} fits no signature")
        self.generic_visit(node)

    def visit_Assign(self, node):
        self.assigned(node.targets[0], node.value)
        self.generic_visit(node)

    def visit_AnnAssign(self, node):
        self.assigned(node.target, node.value)
        self.generic_visit(node)

    def visit_ClassDef(self, node):
        for base in filter(None, map(self.resolve, node.bases)):
            for method in [each for each in node.body if isinstance(each, ast.FunctionDef)]:
                if not hasattr(base, method.name):
                    self.fault(method, f"{base.__name__} never calls {method.name}")
        self.generic_visit(node)

    def assigned(self, target, value):
        """Compare what a call gives with what the table says of the name it gets."""
        called = self.resolve(value.func) if isinstance(value, ast.Call) else None
        if not callable(called):
            return
        text = ast.unparse(target)
        self.seen |= self.table.keys() & {text}
        for _, result in signatures(called):
            known = getattr(trt, result, None) or getattr(core, result, None)
            known = known or getattr(graph, result, None)
            if inspect.isclass(known) and self.table.get(text) is not known:
                self.fault(target, f"{text} is a {result}, which the table does not say")

    def fault(self, node, text):
        self.faults.append(f"line {node.lineno}: {text}")


def is_settable(attribute):
    return getattr(attribute, "fset", None) is not None


def signatures(function):
    """Return the parameters and the last word of the result of every overload.

    Parameters are (name, whether it can be left out, whether it is keyword only).
    """
    if inspect.isclass(function) and function.__module__.startswith("tensorrt"):
        return [(each, function.__name__) for each, _ in signatures(function.__init__)]
    if type(function).__name__ != "instancemethod":  # which is what pybind makes
        return [from_inspect(function)]
    found = re.findall(
        rf"^(?:\d+\. )?{function.__name__}\((.*)\) -> (.*)$", function.__doc__, re.MULTILINE
    )
    return [
        (from_docstring(parameters), last_word(result))
        for parameters, result in found
        if parameters != "*args, **kwargs"
    ]


def from_docstring(text):
    text = re.sub(r"<[^<>]*>", "0", text)  # defaults such as <Strategy.STATIC: 0>
    text = text.replace("::", ".")
    arguments = ast.parse(f"def f({text}): ...").body[0].args
    names = [each.arg for each in arguments.args]
    required = len(names) - len(arguments.defaults)
    rows = [(name, i >= required, False) for i, name in enumerate(names)]
    return rows[1:] if names[:1] == ["self"] else rows


def from_inspect(function):
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return ANYTHING
    rows = [
        (each.name, each.default is not each.empty, each.kind is each.KEYWORD_ONLY)
        for each in signature.parameters.values()
        if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    open_ended = len(rows) != len(signature.parameters)
    if open_ended:
        return ANYTHING
    if rows and rows[0][0] == "self":
        rows = rows[1:]
    result = signature.return_annotation
    return rows, last_word(result if isinstance(result, str) else "")


ANYTHING = (None, "")


def last_word(annotation):
    return re.split(r"[.:]", annotation.strip("'\" "))[-1]


def accepts(parameters, positional, keywords):
    if parameters is None:
        return True
    places = [name for name, _, keyword_only in parameters if not keyword_only]
    filled = set(places[:positional]) | set(keywords)
    known = {name for name, _, _ in parameters}
    required = {name for name, optional, _ in parameters if not optional}
    return positional <= len(places) and set(keywords) <= known and required <= filled


def uses_of(source, table):
    uses = Uses(table)
    uses.visit(ast.parse(source))
    return uses


@pytest.mark.parametrize("name", TABLES)
def test_every_name_and_argument_exists_in_the_installed_packages(name):
    uses = uses_of((FOLDER / name).read_text(), TABLES[name])

    assert uses.faults == []
    assert uses.seen == set(TABLES[name]), "the table names what the file does not have"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("self._engine.create_context()", "has no create_context"),
        ("library.CudaGraphStrategy.WHOLE_GRAPH", "has no WHOLE_GRAPH"),
        ("context.set_input_shape('x')", "fits no signature"),
        ("context.execute_async_v3(stream=1)", "fits no signature"),
        ("context.execute_async_v3(1, 2)", "fits no signature"),
        ("config.cuda_graphs = 1", "has no cuda_graphs"),
        ("self._engine.num_io_tensors = 1", "cannot be set"),
        ("inspector = self._engine.create_engine_inspector()", "is a EngineInspector"),
        ("class Log(library.ILogger):\n def write(self): ...", "never calls write"),
    ],
)
def test_a_misspelling_of_tensorrt_is_found(line, fault):
    (found,) = uses_of(line, TABLES["backends/tensorrt/runtime.py"]).faults

    assert fault in found


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("self._device.allocate(1, self._stream)", "fits no signature"),
        ("self._device.allocate(1)", "fits no signature"),
        ("self._stream.synchronize()", "has no synchronize"),
        ("self._stream.handle(1).x; builder.complete(1, 2)", "fits no signature"),
        ("event = self._stream.record()", "is a Event"),
        ("self._driver.cuMemcpyAsyncs()", "has no cuMemcpyAsyncs"),
    ],
)
def test_a_misspelling_of_cuda_is_found(line, fault):
    assert fault in "; ".join(uses_of(line, TABLES["backends/cuda_device.py"]).faults)


def test_names_that_are_looked_up_by_text_exist():
    choices = get_args(get_type_hints(RunOptions)["specialization"])
    strategies = trt.DynamicShapesKernelSpecializationStrategy.__members__
    flags = re.findall(
        r"\"([A-Z]+(?:_[A-Z]+)+|REFIT)\"", Path(inspect.getfile(engine_recipes)).read_text()
    )

    assert {choice.upper() for choice in choices} == set(strategies)
    assert set(flags) >= {"REFIT", "REQUIRE_USER_ALLOCATION"}
    assert set(flags) <= set(trt.BuilderFlag.__members__)
    assert {each.upper() for each in engine_recipes.TARGETS} <= set(
        trt.ComputeCapability.__members__
    )


def test_the_driver_has_the_functions_and_constants_that_are_called_without_its_bindings():
    source = Path(inspect.getfile(cuda_driver)).read_text()
    attribute = driver.CUdevice_attribute

    functions = re.findall(r"\"(cu[A-Z]\w+)\"", source)

    assert len(functions) >= 6
    assert [name for name in functions if not hasattr(driver, name)] == []
    assert (cuda_driver._MAJOR, cuda_driver._MINOR) == (
        attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    )


def test_modules_that_are_imported_by_text_exist_and_their_values_are_numbers():
    source = Path(inspect.getfile(cuda_device)).read_text()
    modules = re.findall(r"load\(\"([\w.]+)\"\)", source)

    loaded = {name: cuda_device.import_module(name) for name in modules}

    assert set(loaded) == {"cuda.core", "cuda.bindings.driver", "cuda.core._utils.cuda_utils"}
    assert issubclass(loaded["cuda.core._utils.cuda_utils"].CUDAError, Exception)
    assert int(driver.CUstream(7)) == 7
    assert int(driver.CUresult.CUDA_SUCCESS) == 0
    assert "thread_local" in graph.GraphBuilder.begin_building.__doc__


def test_element_types_translate_to_those_of_the_component_table():
    assert tensorrt_runtime._dtype(trt, trt.DataType.FLOAT) == "float32"
    assert tensorrt_runtime._dtype(trt, trt.DataType.INT64) == "int64"
    assert "BF16" in tensorrt_runtime._dtype(trt, trt.DataType.BF16)


def test_a_missing_driver_is_not_a_gpu():
    def load(name):
        return ctypes.CDLL("lib-that-is-not-there-" + name)

    assert cuda_driver.find_gpu(load) is None
