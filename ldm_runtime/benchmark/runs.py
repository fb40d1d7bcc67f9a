"""The measurements of a bundle: every backend in turn, one process after another."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial

from ldm_runtime.backends import BACKENDS, choose_backend
from ldm_runtime.backends.contract import RunOptions
from ldm_runtime.benchmark import process
from ldm_runtime.benchmark.ceilings import Ceilings
from ldm_runtime.benchmark.children import run_child
from ldm_runtime.benchmark.process import IMAGE, Findings, Job
from ldm_runtime.benchmark.rows import Row, machine
from ldm_runtime.benchmark.subject import Subject
from ldm_runtime.benchmark.work import Work
from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.bundle.manifest import MANIFEST_NAME
from ldm_runtime.errors import LdmError

_FLOAT32_BYTES = 4


def runnable_backends(names: Sequence[str], subject: Subject) -> tuple[list[str], list[str]]:
    """Return the backends to measure and, for those that cannot run here, the reasons.

    Args:
        names: Those that were asked for; none is every one that can run.
        subject: The request and its bundle.

    Raises:
        BackendError: One that was asked for cannot run, or there is none at all.
    """
    options = RunOptions(trust_engines=subject.trust_engines)
    choose = partial(
        choose_backend, manifest=subject.manifest, bundle=subject.bundle, options=options
    )
    if names:
        return [choose(name) for name in dict.fromkeys(names)], []
    able, reasons = [], []
    for name in BACKENDS:
        try:
            able.append(choose(name))
        except LdmError as error:
            reasons.append(f"{name}: {error}")
    if not able:
        choose("auto")  # raises, with every reason
    return able, reasons


def find(
    subject: Subject, backends: Sequence[str], repetitions: int
) -> Iterator[tuple[str, Findings]]:
    """Run every backend in its own process, in turns, and yield the findings of each process.

    In turns, so that a disturbance of the machine does not hit one backend alone.

    Args:
        subject: The bundle and its request.
        backends: The backends.
        repetitions: Processes per backend.

    Raises:
        LdmError: A process failed.
    """
    for _ in range(repetitions):
        for backend in backends:
            job = Job(
                bundle=str(subject.bundle),
                backend=backend,
                fields=dict(subject.fields),
                batch_size=subject.request.num_images,
                trust_engines=subject.trust_engines,
            )
            yield backend, _run(job)


def as_rows(subject: Subject, found: Sequence[tuple[str, Findings]], commit: str) -> list[Row]:
    """Return one row per backend, part and state, with the repetitions in order.

    Args:
        subject: The bundle and its request.
        found: The findings, by backend.
        commit: The code that was measured, as a row says it.
    """
    rows = []
    sha256, host = sha256_of(subject.bundle / MANIFEST_NAME), machine()
    for backend in dict.fromkeys(name for name, _ in found):
        findings = [each for name, each in found if name == backend]
        blank = Row(
            name="",
            backend=backend,
            commit=commit,
            bundle_sha256=sha256,
            device=f"{host}; {backend} {findings[0].version} in {findings[0].precision}",
            settings={},
            seconds=(),
        )
        peak = max(each.peak_bytes for each in findings)
        for state in ("first", "steady"):
            parts: list[dict[str, float]] = [getattr(each, state) for each in findings]
            rows += [
                replace(
                    blank,
                    name=part,
                    settings=subject.settings | {"state": state, "calls": _calls(findings, part)},
                    seconds=tuple(each[part] for each in parts),
                    peak_bytes=peak if part == IMAGE and state == "steady" else None,
                )
                for part in parts[0]
            ]
    return rows


def shares(work: Work, seconds: float, ceilings: Ceilings) -> tuple[float, float]:
    """Return the shares of the matmul and of the copy ceiling that a call reached.

    The second counts float32 weights read once, the least that any engine has to move.
    """
    moved = _FLOAT32_BYTES * work.parameters
    return (
        work.flops / seconds / ceilings.matmul_flops,
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
