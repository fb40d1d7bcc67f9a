"""The measurements of `latency.py`: chooses them and collects rows, one process after another."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ldm_runtime import GenerationRequest, LdmError
from ldm_runtime.backends import BACKENDS, choose_backend
from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.bundle.manifest import MANIFEST_NAME, Manifest, load_manifest
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.requests.resolved import ResolvedRequest
from measuring.ceilings import Ceilings
from measuring.flops import Work, network_work
from measuring.measure import IMAGE, Findings, Job
from measuring.rows import ROOT, Row, commit, machine

CHECKPOINT = ROOT / "models/shapes/shapes.ckpt"
CACHE = ROOT / "out/engines"
PROMPT = "a large red circle left of a small blue square on a white background"
_FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The subject of a measurement: one request to one bundle.

    Attributes:
        bundle: The bundle's folder.
        manifest: Its manifest.
        request: The request; its images are one batch.
    """

    bundle: Path
    manifest: Manifest
    request: ResolvedRequest

    @property
    def rows(self) -> int:
        """Rows in a call of the UNet."""
        return self.request.num_images * (1 if self.request.guidance_scale == 1 else 2)

    @property
    def work(self) -> Mapping[str, Work]:
        """Work of one call of each network."""
        factor = self.manifest.spec.autoencoder.factor
        height, width = self.request.height // factor, self.request.width // factor
        return network_work(self.manifest.spec, height, width, self.request.num_images, self.rows)

    @property
    def settings(self) -> dict[str, str | int | float]:
        """Settings stored with every row."""
        names = ("height", "width", "num_inference_steps", "guidance_scale", "sampler", "schedule")
        return {name: getattr(self.request, name) for name in names} | {
            "batch": self.request.num_images,
            "unet_rows": self.rows,
            "weights_dtype": self.manifest.weights_dtype,
        }


def open_subject(bundle: Path | None, fields: Mapping[str, Any]) -> Subject:
    """Return the subject: a bundle, by default of the shapes model, and a resolved request.

    Raises:
        LdmError: There is no such bundle, or its model cannot do what the fields ask for.
    """
    folder = bundle or shapes_bundle()
    manifest = load_manifest(folder)
    request = resolve(GenerationRequest(prompt=PROMPT, seed=0, **fields), manifest.spec)
    return Subject(bundle=folder, manifest=manifest, request=request)


def shapes_bundle(checkpoint: Path = CHECKPOINT, cache: Path = CACHE) -> Path:
    """Return the bundle of the shapes model, exported if it is not there or not of this checkpoint.

    Raises:
        LdmError: It cannot be exported, or another model's bundle is in its place.
    """
    if (cache / MANIFEST_NAME).is_file():
        build = load_manifest(cache).build
        if not checkpoint.is_file() or build.checkpoint_sha256 == sha256_of(checkpoint):
            return cache
        if build.checkpoint != checkpoint.name:
            raise LdmError(
                f"{cache} was made from {build.checkpoint}, not from {checkpoint.name}; "
                f"measure it with --bundle {cache}, or remove it"
            )
    if not checkpoint.is_file():
        raise LdmError(
            f"there is no {checkpoint} to export; give --bundle a folder made by ldm-export"
        )
    print(f"exporting {checkpoint.name} to {cache}, once", file=sys.stderr)
    command = ["-m", "ldm_export.cli", "--ckpt", str(checkpoint), "--out", str(cache)]
    command += ["--engines", "none", "--replace"]  # an older checkpoint of the same name
    if subprocess.run([sys.executable, *command], stdout=sys.stderr, cwd=ROOT).returncode:
        raise LdmError(f"exporting {checkpoint} failed; the reason is above")
    return cache


def runnable_backends(names: Sequence[str], subject: Subject) -> tuple[list[str], list[str]]:
    """Return the backends to measure and, for those that cannot run here, the reasons.

    Args:
        names: Those that were asked for; none is every one that can run.
        subject: The request and its bundle.

    Raises:
        BackendError: One that was asked for cannot run, or there is none at all.
    """
    choose = partial(choose_backend, manifest=subject.manifest, bundle=subject.bundle)
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

    Raises:
        LdmError: A process failed.
    """
    known = asdict(subject.request.as_request())
    fields = {key: value for key, value in known.items() if value is not None}
    for _ in range(repetitions):
        for backend in backends:
            job = Job(
                bundle=str(subject.bundle),
                backend=backend,
                fields=fields,
                batch_size=subject.request.num_images,
            )
            yield backend, _run(job)


def as_rows(subject: Subject, found: Sequence[tuple[str, Findings]]) -> list[Row]:
    """Return one row per backend, part and state, with the repetitions in order."""
    rows = []
    head, sha256, host = commit(), sha256_of(subject.bundle / MANIFEST_NAME), machine()
    for backend in dict.fromkeys(name for name, _ in found):
        findings = [each for name, each in found if name == backend]
        blank = Row(
            name="",
            backend=backend,
            commit=head,
            bundle_sha256=sha256,
            device=f"{host}; {backend} {findings[0].version}",
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
    command = [sys.executable, str(Path(__file__).with_name("measure.py")), json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LdmError(f"measuring {job.backend} failed: {done.stderr.strip()}")
    findings = Findings(**json.loads(done.stdout.splitlines()[-1]))
    if findings.heavy:
        raise LdmError(
            f"{job.backend} loaded {', '.join(findings.heavy)}; its memory is not its own"
        )
    return findings
