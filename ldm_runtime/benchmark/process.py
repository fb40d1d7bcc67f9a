"""The measuring process: one backend, one bundle, its first image and its second.

Started by `runs.find` with a job as JSON; answers with one line of JSON. Every call of a network is
timed inside the image that needs it, so that the parts add up to the whole.
"""

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

if TYPE_CHECKING:
    from ldm_runtime import Generator
    from ldm_runtime.backends import Backend, BackendName
    from ldm_runtime.backends.contract import Engine, EngineSource, Precision, Runner, Tensors
    from ldm_runtime.requests.resolved import ResolvedRequest

#: Packages that a deployment must not need; one of them in the process would falsify its memory.
HEAVY = ("torch", "transformers", "onnx", "diffusers", "ldm_export")
#: A whole image (or batch), and its time that no network takes.
IMAGE, REST = "image", "rest"
#: From the start of the process to its first image: import, load and generate.
COLD_START = "cold_start"


@dataclass(frozen=True, kw_only=True)
class Job:
    """The measurement to take.

    Attributes:
        bundle: The bundle's folder.
        backend: Name of a backend.
        fields: Fields of the request, for `subject.open_subject`.
        batch_size: Images in one call.
        trust_engines: Whether TensorRT may run engines that were not built on this machine.
        precision: Precision to compute in; None is the backend's own choice.
        threads: Threads that compute; None is the generator's own choice.
    """

    bundle: str
    backend: str
    fields: dict[str, Any]
    batch_size: int
    trust_engines: bool
    precision: "Precision | None" = None
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The measurements of one process.

    Attributes:
        first: Seconds the first time: "import", "load" (with a check of the files' hashes), the
            first call of each network, the image, its rest, and `COLD_START`.
        steady: Seconds once warm: "load" (hashes known), a call of each network as the mean over
            an image, the image and its rest. Calls and rest add up to the image.
        calls: How often an image calls each network.
        peak_bytes: Highest resident memory up to the end of the second image.
        version: Of the library behind the backend.
        precision: Precision that it computes in.
        heavy: Which of `HEAVY` were loaded: none, or the measurement is void.
    """

    first: dict[str, float]
    steady: dict[str, float]
    calls: dict[str, int]
    peak_bytes: int
    version: str
    precision: str
    heavy: list[str]


class Clock:
    """Seconds of every call of every network, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def timed(self, name: str, call: "Callable[[], Tensors]") -> "Tensors":
        """Call and take the time."""
        started = time.perf_counter()
        outputs = call()
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)
        return outputs

    def take(self) -> dict[str, list[float]]:
        """Return the measurements and forget them."""
        seconds, self.seconds = self.seconds, {}
        return seconds


class TimedRunner:
    """A runner that tells a clock."""

    def __init__(self, runner: "Runner", name: str, clock: Clock) -> None:
        self._runner, self._name, self._clock = runner, name, clock

    def run(self, inputs: "Tensors") -> "Tensors":
        """Run; outputs are arrays in memory, so no device is still at work afterwards."""
        return self._clock.timed(self._name, lambda: self._runner.run(inputs))


class TimedEngine(TimedRunner):
    """An engine that tells a clock."""

    def __init__(self, engine: "Engine", name: str, clock: Clock) -> None:
        super().__init__(engine, name, clock)
        self._engine = engine

    def bind(self, constants: "Tensors") -> "Runner":
        """Fix some inputs."""
        return TimedRunner(self._engine.bind(constants), self._name, self._clock)

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def time_engines(backend: "Backend", clock: Clock) -> None:
    """Let every engine that a backend opens tell a clock, for the rest of this process."""
    plain_open = backend.open_engine

    def open_timed(source: "EngineSource") -> TimedEngine:
        return TimedEngine(plain_open(source), source.component.name, clock)

    cast("Any", backend).open_engine = open_timed


def measure(job: Job, backend: "Backend", imported: float) -> Findings:
    """Open the bundle, generate twice, and open it once more.

    Args:
        job: The measurement to take.
        backend: The job's backend.
        imported: Seconds it took to import.
    """
    from ldm_runtime import Generator
    from ldm_runtime.benchmark.subject import open_subject

    clock, request = Clock(), open_subject(Path(job.bundle), job.fields).request

    def load() -> tuple[Generator, float]:
        started = time.perf_counter()
        name = cast("BackendName", job.backend)  # which `get_backend` has found
        generator = Generator(
            job.bundle,
            backend=name,
            precision=job.precision,
            threads=job.threads,
            batch_size=job.batch_size,
            trust_engines=job.trust_engines,
        )
        return generator, time.perf_counter() - started

    time_engines(backend, clock)
    generator, first_load = load()
    with generator:
        first_calls, first_whole = _generate(generator, request, clock)
        calls, whole = _generate(generator, request, clock)
    peak = peak_bytes()
    generator, steady_load = load()
    generator.close()
    first = {name: seconds[0] for name, seconds in first_calls.items()} | first_whole
    steady = {name: statistics.fmean(seconds) for name, seconds in calls.items()} | whole
    cold_start = imported + first_load + first[IMAGE]
    return Findings(
        first={"import": imported, "load": first_load, COLD_START: cold_start, **first},
        steady={"load": steady_load, **steady},
        calls={name: len(seconds) for name, seconds in calls.items()},
        peak_bytes=peak,
        version=backend.version(),
        precision=generator.precision,
        heavy=[name for name in HEAVY if name in sys.modules],
    )


def _generate(
    generator: "Generator", request: "ResolvedRequest", clock: Clock
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the seconds of every call of every network, and those of the image and its rest."""
    started = time.perf_counter()
    generator.generate(request)
    total = time.perf_counter() - started
    calls = clock.take()
    return calls, {IMAGE: total, REST: total - sum(map(sum, calls.values()))}


def peak_bytes() -> int:
    """Return the highest resident memory of this process.

    Not `ru_maxrss` where Linux tells: that begins at the size of the process that started this one.
    """
    try:
        status = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource  # which Windows does not have

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (line,) = (line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def forget_peak() -> int:
    """Let `peak_bytes` begin at what is resident now, where Linux permits it, and return that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def main() -> int:
    """Do one job: 0 on success, 1 if the bundle or the backend cannot do it."""
    job = Job(**json.loads(sys.argv[1]))
    started = time.perf_counter()
    from ldm_runtime import LdmError
    from ldm_runtime.backends import get_backend

    try:
        backend = get_backend(job.backend)
        findings = measure(job, backend, imported=time.perf_counter() - started)
    except LdmError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps(asdict(findings)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
