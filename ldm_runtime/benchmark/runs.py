"""The measurements of a bundle: every backend and precision in turn, one process after another."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import cast

from ldm_runtime.backends import BACKENDS, choose_backend, get_backend
from ldm_runtime.backends.contract import Precision, RunOptions
from ldm_runtime.backends.processors import compute_threads
from ldm_runtime.benchmark import process
from ldm_runtime.benchmark.ceilings import Ceilings
from ldm_runtime.benchmark.children import run_child
from ldm_runtime.benchmark.process import IMAGE, Findings, Job
from ldm_runtime.benchmark.rows import Row, machine
from ldm_runtime.benchmark.subject import Subject
from ldm_runtime.benchmark.work import Work
from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.bundle.manifest import MANIFEST_NAME
from ldm_runtime.errors import BackendError, LdmError

_BYTES: Mapping[Precision, int] = MappingProxyType({"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1})
#: Networks that have graphs in 8 bits; the others are in another precision then.
_IN_8_BITS = frozenset({"unet", "unet_shallow"})


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A backend, and the precision and threads that it computes with; None is its own choice."""

    backend: str
    precision: Precision | None = None
    threads: int | None = None


def runnable_configurations(
    names: Sequence[str],
    subject: Subject,
    *,
    precisions: Sequence[Precision] = (),
    threads: int | None = None,
) -> tuple[list[Configuration], list[str]]:
    """Return the configurations to measure and, for those that cannot run here, the reasons.

    Args:
        names: Backends that were asked for; none is every one that can run.
        subject: The request and its bundle.
        precisions: Precisions to measure each backend in; none is its own choice.
        threads: Threads that compute.

    Raises:
        BackendError: A backend that was asked for cannot run in any of the precisions, or there is
            none at all.
    """

    def choose(name: str, precision: Precision | None) -> str:
        options = RunOptions(trust_engines=subject.trust_engines, precision=precision)
        return choose_backend(name, subject.manifest, bundle=subject.bundle, options=options)

    able: list[Configuration] = []
    reasons: list[str] = []
    for name in dict.fromkeys(names or BACKENDS):
        failures: list[LdmError] = []
        wanted: Sequence[Precision | None] = list(dict.fromkeys(precisions)) or [None]
        for precision in wanted:
            try:
                backend = choose(name, precision)
            except LdmError as error:
                failures.append(error)
                continue
            able.append(Configuration(backend=backend, precision=precision, threads=threads))
        if names and len(failures) == len(wanted):
            raise failures[0]
        reasons += [f"{name}: {error}" for error in failures]
    if not able:
        choose("auto", None)  # raises, with every reason
        raise BackendError(f"nothing to measure: {'; '.join(reasons)}")
    return list(dict.fromkeys(able)), reasons


def find(
    subject: Subject, configurations: Sequence[Configuration], repetitions: int
) -> Iterator[tuple[Configuration, Findings]]:
    """Run every configuration in its own process, in turns, and yield each process's findings.

    In turns, so that a disturbance of the machine does not hit one backend alone.

    Args:
        subject: The bundle and its request.
        configurations: The configurations.
        repetitions: Processes per configuration.

    Raises:
        LdmError: A process failed.
    """
    for _ in range(repetitions):
        for configuration in configurations:
            job = Job(
                bundle=str(subject.bundle),
                backend=configuration.backend,
                precision=configuration.precision,
                threads=configuration.threads,
                fields=dict(subject.fields),
                batch_size=subject.request.num_images,
                trust_engines=subject.trust_engines,
            )
            yield configuration, _run(job)


def as_rows(
    subject: Subject, configuration: Configuration, findings: Sequence[Findings], commit: str
) -> list[Row]:
    """Return one row per part and state of a configuration, with the repetitions in order.

    Args:
        subject: The bundle and its request.
        configuration: The configuration.
        findings: Of each of its processes.
        commit: The code that was measured, as a row says it.
    """
    backend, precision = configuration.backend, findings[0].precision
    blank = Row(
        name="",
        backend=backend,
        commit=commit,
        bundle_sha256=sha256_of(subject.bundle / MANIFEST_NAME),
        device=f"{machine()}; {backend} {findings[0].version} in {precision}",
        settings=subject.settings
        | {"precision": precision, "threads": compute_threads(configuration.threads)},
        seconds=(),
    )
    peak = max(each.peak_bytes for each in findings)
    rows = []
    for state in ("first", "steady"):
        parts: list[dict[str, float]] = [getattr(each, state) for each in findings]
        for part in parts[0]:
            of_part = {"state": state, "calls": _calls(findings, part)}
            rows.append(
                replace(
                    blank,
                    name=part,
                    settings={**blank.settings, **of_part},
                    seconds=tuple(each[part] for each in parts),
                    peak_bytes=peak if part == IMAGE and state == "steady" else None,
                )
            )
    return rows


def shares(work: Work, row: Row, ceilings: Ceilings) -> tuple[float | None, float | None]:
    """Return the shares of the matmul and of the copy ceiling that a call reached.

    The second counts weights in the row's precision, read once, the least that any engine has to
    move. Ceilings are of the processor, and that of products of float32: None is the share of a
    ceiling that a row is not measured against: in 8 bits, that of a network that is not.
    """
    if get_backend(row.backend).ABILITIES.variant != "fp32":  # on a GPU
        return None, None
    precision = cast("Precision", row.settings["precision"])
    if precision == "int8" and row.name not in _IN_8_BITS:
        return None, None
    seconds, moved = row.median_seconds, _BYTES[precision] * work.parameters
    return (
        work.flops / seconds / ceilings.matmul_flops if precision == "fp32" else None,
        moved / seconds / ceilings.copy_bytes,
    )


def _calls(findings: Sequence[Findings], part: str) -> int:
    return findings[0].calls.get(part, 1)


def _run(job: Job) -> Findings:
    answer = run_child(f"measuring {job.backend}", process.__file__, [json.dumps(asdict(job))])
    findings = Findings(**answer)
    if findings.heavy:
        raise LdmError(
            f"{job.backend} loaded {', '.join(findings.heavy)}; its memory is not its own"
        )
    return findings
