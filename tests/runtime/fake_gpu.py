"""A GPU and TensorRT engines in plain Python, for the rules around them.

Work is queued and only done by `synchronize`, at the addresses it was queued with, so that reading
too early, replaying a graph of yesterday and touching freed memory all show.
"""

import hashlib
from dataclasses import replace

import numpy as np

from ldm_runtime.backends.cuda_device import out_of_memory
from ldm_runtime.backends.tensorrt import Vendor
from ldm_runtime.bundle.manifest import MANIFEST_NAME, FileRecord, encode_manifest, load_manifest
from ldm_runtime.engines.gpu import Gpu
from ldm_runtime.engines.records import EngineRecord, ProfileRecord, encode_engine_record
from ldm_runtime.errors import BackendError
from ldm_runtime.testing import tiny_networks

GPU = Gpu(name="NVIDIA Fake 4000", compute_capability=(8, 9), driver_version="13.0")
VERSION = "1.7.1.116"
PROFILES = {
    "text_encoder": {
        "tokens": ((1, 16), (2, 16), (8, 16)),
        "learned_embeddings": ((1, 16, 8), (2, 16, 8), (8, 16, 8)),
        "clip_skip": ((1,), (2,), (8,)),
    },
    "unet": {
        "latents": ((1, 4, 4, 4), (2, 4, 8, 8), (8, 4, 16, 16)),
        "timesteps": ((1,), (2,), (8,)),
        "context": ((1, 16, 8), (2, 16, 8), (8, 64, 8)),
    },
    "vae_decoder": {"latents": ((1, 4, 4, 4), (1, 4, 8, 8), (4, 4, 16, 16))},
    "vae_encoder": {"image": ((1, 3, 8, 8), (1, 3, 16, 16), (4, 3, 32, 32))},
}


class FakeMemory:
    def __init__(self, device, address, size, kind):
        self.address, self.size, self.kind = address, size, kind
        self.array = np.full(size, 0xAA, dtype=np.uint8)
        self._device = device

    def close(self):
        self._device.memory.pop(self.address, None)


class FakeGraph:
    def __init__(self, device, work):
        self._device, self._work = device, work

    def launch(self):
        assert self._work is not None, "a closed graph is launched"
        self._device.launches += 1
        self._device.queue.extend(self._work)

    def close(self):
        self._work = None


class FakeDevice:
    """A GPU that counts; `limit` is how many bytes it has."""

    stream = 7

    def __init__(self, limit=None, can_record=True):
        self.memory, self.queue, self.copies = {}, [], []
        self.launches = self.recordings = self.currents = 0
        self.limit, self.can_record, self.closed = limit, can_record, False
        self._next = 4096

    def make_current(self):
        self.currents += 1

    def allocate(self, size):
        used = sum(each.size for each in self.memory.values() if each.kind == "gpu")
        if self.limit is not None and used + size > self.limit:
            raise out_of_memory(f"reserving {size} bytes")
        return self._allocate(size, "gpu")

    def allocate_pinned(self, size):
        return self._allocate(size, "host")

    def copy(self, target, source, size):
        to, of = self.memory[target], self.memory[source]
        self.copies.append((of.kind, to.kind, size))
        self.queue.append(lambda: self._copy(target, source, size))

    def record(self, work):
        if not self.can_record:
            raise BackendError("CUDA failed recording a graph: not permitted")
        self.recordings += 1
        before, self.queue = self.queue, []
        work()
        graph, self.queue = FakeGraph(self, self.queue), before
        return graph

    def synchronize(self):
        queue, self.queue = self.queue, []
        for work in queue:
            work()

    def close(self):
        assert not self.closed
        self.closed = True

    def view(self, address, shape, dtype):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert address in self.memory, "freed memory is used"
        assert size <= self.memory[address].size, "a buffer is too small"
        return self.memory[address].array[:size].view(dtype).reshape(shape)

    def _copy(self, target, source, size):
        self.memory[target].array[:size] = self.memory[source].array[:size]

    def _allocate(self, size, kind):
        memory = FakeMemory(self, self._next, size, kind)
        self.memory[self._next] = memory
        self._next += 4096 * (size // 4096 + 1)
        return memory


class FakeContext:
    def __init__(self, plan, shapes):
        self.shapes, self.closed = dict(shapes), False
        self._plan, self._addresses, self._scratch = plan, {}, (0, 0)
        zeros = {each.name: np.zeros(shapes[each.name], each.dtype) for each in plan.record.inputs}
        self._outputs = {
            name: array.shape for name, array in plan.function(zeros).items() if array.size
        }

    def output_shape(self, name):
        return self._outputs[name]

    def scratch_size(self):
        return 4 * sum(int(np.prod(shape)) for shape in self.shapes.values())

    def set_scratch(self, address, size):
        self._scratch = address, size

    def set_address(self, name, address):
        self._addresses[name] = address

    def enqueue(self, stream):
        assert not self.closed, "a closed context runs"
        device, addresses, (scratch, size) = self._plan.device, dict(self._addresses), self._scratch
        assert stream == device.stream
        assert size >= self.scratch_size()
        self._plan.enqueued += 1

        def work():
            device.view(scratch, (size,), np.uint8)[...] = 0x55
            inputs = {
                each.name: device.view(addresses[each.name], self.shapes[each.name], each.dtype)
                for each in self._plan.record.inputs
            }
            for name, array in self._plan.function(inputs).items():
                device.view(addresses[name], array.shape, array.dtype)[...] = array

        device.queue.append(work)

    def close(self):
        self.closed = True


class FakePlan:
    """The engine of one component of the tiny bundle."""

    def __init__(self, device, component, *, records_graphs=True):
        self.device, self.record, self.records_graphs = device, component, records_graphs
        self.function = tiny_networks()[component.name]
        self.contexts, self.enqueued, self.closed = [], 0, False

    def new_context(self, shapes):
        self.contexts.append(FakeContext(self, shapes))
        return self.contexts[-1]

    def close(self):
        assert all(context.closed for context in self.contexts)
        self.closed = True


class FakeVendor:
    """A machine with one GPU and TensorRT-RTX; keeps what was opened and loaded."""

    def __init__(self, gpu=GPU, versions=None, device=None, is_trusted=lambda sha256: True):
        self.device = device or FakeDevice()
        self.plans, self.loaded, self.opened = {}, [], 0
        versions = {"tensorrt_rtx": VERSION} if versions is None else versions
        self.vendor = Vendor(
            find_gpu=lambda: gpu,
            versions=lambda builders: {k: v for k, v in versions.items() if k in builders},
            open_device=self._open,
            is_trusted=is_trusted,
            load_engine_file=self._load,
        )

    def _open(self):
        self.opened += 1
        return self.device

    def _load(self, path, record, component, options, cache):
        self.loaded.append((path, record, options, cache))
        plan = FakePlan(self.device, component, records_graphs=options.cuda_graphs)
        self.plans[component.name] = plan
        return plan


def make_record(manifest, component, **changes):
    """Return a record that fits GPU and VERSION, but for the changes."""
    hashes = {each.path: each.sha256 for each in manifest.files}
    network = manifest.component(component)
    plan = f"plan of {component}".encode()
    record = EngineRecord(
        component=component,
        builder="tensorrt_rtx",
        builder_version=VERSION,
        graph_sha256=hashes[network.graphs[0].file],
        weights_sha256=hashes[network.weights_file],
        flags=(),
        profiles=tuple(
            ProfileRecord(input=name, min=low, opt=opt, max=high)
            for name, (low, opt, high) in PROFILES[component].items()
        ),
        targets=("sm86", "sm89"),
        gpu_name=None,
        plan=f"{component}.plan",
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        driver_version=None,
        seconds=1.0,
        size_bytes=len(plan),
    )
    return replace(record, **changes)


def add_engines(bundle, **changes):
    """Give a tiny bundle engines, with these changes to their records; return its manifest."""
    manifest = load_manifest(bundle)
    engines, files = [], list(manifest.files)
    for component in PROFILES:
        record = make_record(manifest, component, **changes)
        contents = {
            record.engine_path: f"plan of {component}".encode(),
            record.record_path: encode_engine_record(record),
        }
        for path, data in contents.items():
            (bundle / path).parent.mkdir(parents=True, exist_ok=True)
            (bundle / path).write_bytes(data)
            sha256 = hashlib.sha256(data).hexdigest()
            files.append(FileRecord(path=path, sha256=sha256, size_bytes=len(data)))
        engines.append(record.record_path)
    manifest = replace(manifest, engines=(*manifest.engines, *engines), files=tuple(files))
    (bundle / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    return manifest
