import enum
import logging
from types import ModuleType

import numpy as np
import pytest

from ldm_runtime.backends.contract import RunOptions
from ldm_runtime.backends.tensorrt.runtime import LoadedEngine
from ldm_runtime.bundle.manifest import load_manifest
from ldm_runtime.errors import BackendError
from tests.runtime.fake_gpu import make_record


class Logger:
    ERROR, INTERNAL_ERROR = "error", "internal error"


Strategy = enum.Enum("Strategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"])
Specialization = enum.Enum("Specialization", ["LAZY", "EAGER", "NONE"])
Graphs = enum.Enum("Graphs", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])


class Library(ModuleType):
    """TensorRT's module, as far as running goes; `refuses` is the call that fails, and why."""

    ILogger = Logger
    ExecutionContextAllocationStrategy = Strategy
    DynamicShapesKernelSpecializationStrategy = Specialization
    CudaGraphStrategy = Graphs

    def __init__(self, refuses="", complaint="Error Code 1: Myelin"):
        super().__init__("fake_tensorrt_library")
        self.refuses, self.complaint = refuses, complaint
        self.tensors = {"latents": "float32", "image": "float32"}
        self.engine = self.logger = None

    def Runtime(self, logger):  # noqa: N802  (the vendor's name)
        self.logger = logger
        return self

    def deserialize_cuda_engine(self, data):
        self.engine = Engine(self, data)
        return self.answer("deserialize", self.engine)

    def nptype(self, dtype):
        return np.dtype(dtype)

    def answer(self, call, value, failure=None):
        if call != self.refuses:
            return value
        self.logger.log("error", self.complaint)
        return failure


class Engine:
    def __init__(self, library, data):
        self.library, self.data = library, data
        self.num_io_tensors = len(library.tensors)
        self.config, self.settings, self.contexts = None, [], []

    def get_tensor_name(self, index):
        return list(self.library.tensors)[index]

    def get_tensor_dtype(self, name):
        return self.library.tensors[name]

    def create_runtime_config(self):
        self.config = Config()
        return self.config

    def create_execution_context(self, settings):
        self.settings.append(settings)
        self.contexts.append(Context(self.library))
        return self.library.answer("context", self.contexts[-1])


class Config:
    dynamic_shapes_kernel_specialization_strategy = cuda_graph_strategy = None
    allocation = cache = None

    def set_execution_context_allocation_strategy(self, strategy):
        self.allocation = strategy

    def create_runtime_cache(self):
        return Cache()

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True


class Cache:
    data = b""

    def deserialize(self, data):
        self.data = data
        return True

    def serialize(self):
        return memoryview(self.data + b"+kernels")


class Context:
    def __init__(self, library):
        self.library, self.shapes, self.addresses, self.scratch = library, {}, {}, None

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return self.library.answer("shape", True, False)

    def infer_shapes(self):
        return ["latents"] if self.library.refuses == "infer" else []

    def get_tensor_shape(self, name):
        return [1, 3, 16, 16]

    def update_device_memory_size_for_shapes(self):
        return 12345

    def set_device_memory(self, address, size):
        self.scratch = (address, size)

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return self.library.answer("address", True, False)

    def execute_async_v3(self, stream):
        return self.library.answer("run", True, False)


@pytest.fixture
def load(tiny_bundle, tmp_path):
    """Loads a plan of the decoder with a fake library."""
    manifest = load_manifest(tiny_bundle)
    plan = tmp_path / "vae_decoder.plan"
    plan.write_bytes(b"plan")

    def run(library, *, options=None, **changes):
        record = make_record(manifest, "vae_decoder", **changes)
        component = manifest.component("vae_decoder")
        options = options or RunOptions()
        return LoadedEngine(plan, record, component, options, tmp_path / "cache", library)

    return run


def use(plan):
    context = plan.new_context({"latents": (1, 4, 8, 8)})
    context.set_scratch(512, 12345)
    context.set_address("latents", 1024)
    context.enqueue(7)
    return context


def test_a_plan_is_loaded_shaped_and_run(load):
    library = Library()

    context = use(load(library))

    assert library.engine.data == b"plan"
    assert context.output_shape("image") == (1, 3, 16, 16)
    assert context.scratch_size() == 12345
    (made,) = library.engine.contexts
    assert (made.shapes, made.scratch) == ({"latents": (1, 4, 8, 8)}, (512, 12345))


@pytest.mark.parametrize(
    ("refuses", "sentence"),
    [
        ("deserialize", r"^TensorRT-RTX 1\.7\.1\.116 cannot load .*vae_decoder\.plan "),
        ("context", r"cannot make it ready to run \(vae_decoder\): Error Code 1: Myelin$"),
        ("shape", r"cannot take latents of shape 1x4x8x8 \(vae_decoder\): Error Code 1"),
        ("infer", r"cannot run without shapes of latents \(vae_decoder\): it gave no reason"),
        ("address", r"cannot use the memory of latents \(vae_decoder\): Error Code 1"),
        ("run", r"cannot run \(vae_decoder\): Error Code 1: Myelin$"),
    ],
)
def test_every_refusal_is_our_error_in_the_words_of_the_library(load, refuses, sentence):
    with pytest.raises(BackendError, match=sentence):
        use(load(Library(refuses)))


def test_out_of_memory_says_what_to_do(load):
    library = Library("context", "CUDA error 2: outOfMemory (requested 9 GiB)")

    with pytest.raises(BackendError, match=r"the GPU ran out of memory .*fewer or smaller images"):
        use(load(library))


def test_an_engine_of_another_network_is_refused(load):
    library = Library()
    library.tensors = {"latents": "float16", "image": "float32"}

    with pytest.raises(
        BackendError,
        match=r"has the tensors image float32, latents float16, but the manifest says "
        r"image float32, latents float32; run `ldm build-engines`",
    ):
        load(library)


@pytest.mark.parametrize("choice", ["lazy", "eager", "none"])
@pytest.mark.parametrize(
    ("graphs", "strategy"), [(True, "WHOLE_GRAPH_CAPTURE"), (False, "DISABLED")]
)
def test_tensorrt_rtx_is_told_how_to_compile_and_records_graphs_itself(
    load, choice, graphs, strategy
):
    library = Library()

    plan = load(library, options=RunOptions(cuda_graphs=graphs, specialization=choice))
    use(plan)

    config = library.engine.config
    assert config.dynamic_shapes_kernel_specialization_strategy.name == choice.upper()
    assert config.cuda_graph_strategy.name == strategy
    assert config.allocation.name == "USER_MANAGED"
    assert library.engine.settings == [config]
    assert not plan.records_graphs


def test_tensorrt_leaves_recording_to_us_and_compiles_nothing(load, tmp_path):
    library = Library()

    plan = load(library, builder="tensorrt", options=RunOptions(cuda_graphs=True))
    use(plan)
    plan.close()

    assert plan.records_graphs
    assert library.engine.settings == [Strategy.USER_MANAGED]
    assert library.engine.config is None
    assert not (tmp_path / "cache").exists()


def test_compiled_kernels_are_kept_when_the_engine_closes_and_found_again(load, tmp_path):
    first = Library()
    load(first).close()

    kept = (tmp_path / "cache").read_bytes()
    second = Library()
    load(second)

    assert kept == b"+kernels"
    assert second.engine.config.cache.data == kept


def test_kernels_in_a_folder_that_others_may_write_to_are_not_loaded(load, tmp_path, caplog):
    """Kernels are code, as engines are."""
    load(Library()).close()
    tmp_path.chmod(0o770)
    library = Library()

    with caplog.at_level(logging.WARNING):
        load(library)

    assert library.engine.config.cache.data == b""
    (message,) = caplog.messages
    assert message.startswith(
        f"{tmp_path / 'cache'} cannot be read (others may write to its folder"
    )
    assert message.endswith("kernels are compiled again")
