"""The programs that are compared, as records: where each one runs, and what it reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measuring.rows import ROOT

#: Where `make peers` puts one virtual environment per peer.
ENVIRONMENTS = ROOT / ".venv-peers"
PINS = Path(__file__).parent / "environments"
WORKERS = Path(__file__).parent / "workers"
#: Before the backend in the name of this package's own entrants.
OURS = "ldm-deploy"


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One program, or one way to use it.

    Attributes:
        name: As a row says it.
        environment: Name of its virtual environment; None is the one that runs the benchmark.
        worker: Script that measures it, in `workers/` unless absolute.
        form: Form of the weights that it reads; see `peers.weights`.
        precisions: Precisions that it computes in.
        options: Options of its worker.
    """

    name: str
    environment: str | None
    worker: str
    form: str
    precisions: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Start:
    """An entrant in one of its precisions, measured once in every round."""

    entrant: Entrant
    precision: str

    def __str__(self) -> str:
        return f"{self.entrant.name} {self.precision}"


#: The peers, by the names that `--peers` takes. The first is what images are compared with.
PEERS: Mapping[str, Entrant] = {
    entrant.name: entrant
    for entrant in (
        Entrant(
            name="diffusers",
            environment="diffusers",
            worker="diffusers_worker.py",
            form="diffusers",
            precisions=("fp32", "bf16"),
        ),
        Entrant(
            name="diffusers-compile",
            environment="diffusers",
            worker="diffusers_worker.py",
            form="diffusers",
            precisions=("fp32", "bf16"),
            options={"compile": True},
        ),
        Entrant(
            name="openvino-genai",
            environment="openvino_genai",
            worker="openvino_genai_worker.py",
            form="openvino",
            precisions=("fp32", "bf16"),
        ),
        Entrant(
            name="optimum-onnx",
            environment="optimum_onnx",
            worker="optimum_onnx_worker.py",
            form="onnx",
            precisions=("fp32",),
        ),
        Entrant(
            name="stable-diffusion.cpp",
            environment="stable_diffusion_cpp",
            worker="stable_diffusion_cpp_worker.py",
            form="checkpoint",
            precisions=("fp16",),  # the weights of convolutions, whatever the file has
        ),
    )
}


def _own(backend: str, precisions: tuple[str, ...], **options: Any) -> Entrant:  # noqa: ANN401
    """Return this package with one of its backends and with options of its generator."""
    return Entrant(
        name=" ".join([OURS, backend, *(name.replace("_", "-") for name in options)]),
        environment=None,
        worker="ldm_deploy_worker.py",
        form="bundle",
        precisions=precisions,
        options={"backend": backend, "generator": options},
    )


#: This package in all the ways in which it is compared.
OWN: Sequence[Entrant] = (
    _own("onnxruntime", ("fp32",)),
    _own("openvino", ("fp32", "bf16")),
    _own("openvino", ("bf16",), low_memory=True),
)


def starts(entrants: Sequence[Entrant], precisions: Sequence[str] = ()) -> list[Start]:
    """Return what to measure in every round: each entrant in each of its precisions.

    Args:
        entrants: The programs.
        precisions: Only these; none is all.
    """
    return [
        Start(entrant=entrant, precision=precision)
        for entrant in entrants
        for precision in entrant.precisions
        if not precisions or precision in precisions
    ]
