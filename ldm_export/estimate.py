"""The estimates of an export: its steps, time, memory and size, from the number of parameters."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

from ldm_runtime.bundle.manifest import WeightsDType
from ldm_runtime.escaping import printable
from ldm_runtime.specs.components import COMPONENTS
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.tasks import takes_prompts, task_record

# Fitted, like the `trace_seconds` of each component, to exports of the shapes model and of Stable
# Diffusion 1.5 on a 2-core machine (benchmarks/export_full_size.py). Tracing costs much the same
# for a small network as for a large one.
_SECONDS_PER_PARAMETER = 90e-9
_PREVIEW_SECONDS_PER_PARAMETER = 250e-9  # of the encoder, which encodes the images
_GOLDEN_SECONDS, _GOLDEN_SECONDS_PER_PARAMETER = 3.0, 35e-9
# Six samples of a small image, and reading all weights but the decoder's.
_PREDICTION_SECONDS, _PREDICTION_SECONDS_PER_PARAMETER = 0.5, 10e-9
_BASE_BYTES, _BYTES_PER_PARAMETER = 700_000_000, 5.7
# Measured with TensorRT-RTX (benchmarks/engines_full_size.py); TensorRT takes minutes more.
_ENGINE_SECONDS, _ENGINE_SECONDS_PER_PARAMETER = 3.0, 20e-9
_GRAPH_BYTES = 1_500_000
#: Quick steps, which are repeated or looked up in the manifest and not reused as files.
_QUICK = ("prediction", "preview", "tokenizer")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimates of one export.

    Attributes:
        spec: The model.
        parameters: Number of weights per component.
        step_seconds: Time per step on two cores.
        bundle_bytes: Size of the bundle.
        peak_bytes: Highest resident memory.
        destination: What becomes of the bundle in its place, as a line of text; empty without one.
    """

    spec: ModelSpec
    parameters: Mapping[str, int]
    step_seconds: Mapping[str, float]
    bundle_bytes: int
    peak_bytes: int
    destination: str = ""

    def replacing(self, checkpoint: str) -> "Estimate":
        """Return it with the note that the bundle of another checkpoint is in its place."""
        name = printable(checkpoint)
        line = f"replaces          the bundle of another checkpoint, {name}: add --replace"
        return replace(self, destination=line)

    def reusing(self, steps: Collection[str]) -> "Estimate":
        """Return it without the time of steps that a bundle of the same checkpoint has done."""
        seconds = {name: 0.0 if name in steps else each for name, each in self.step_seconds.items()}
        work = [name for name, each in seconds.items() if each and name not in _QUICK]
        line = f"replaces          the bundle of the same checkpoint; new: {', '.join(work)}"
        if not work:
            seconds = dict.fromkeys(seconds, 0.0)
            line = "nothing to do     the bundle is up to date"
        return replace(self, step_seconds=seconds, destination=line)

    def as_json(self) -> dict[str, Any]:
        """Return the estimates as JSON has them."""
        return {
            "family": self.spec.family,
            "weights": self.spec.weights,
            "task": self.spec.task,
            "parameters": dict(self.parameters),
            "seconds": sum(self.step_seconds.values()),
            "step_seconds": dict(self.step_seconds),
            "bundle_bytes": self.bundle_bytes,
            "peak_bytes": self.peak_bytes,
            "assumptions": [asdict(each) for each in self.spec.assumptions],
            "destination": self.destination,
        }

    def describe(self) -> str:
        """Return the estimates as lines of text."""
        lines = [
            f"family            {self.spec.family} ({self.spec.weights} weights)",
            f"task              {self.spec.task}{_needs(self.spec)}",
        ]
        lines += [
            f"{name:<17} {count / 1e6:,.2f} M parameters, about {self.step_seconds[name]:.0f} s"
            for name, count in self.parameters.items()
        ]
        lines += [
            f"{step:<17} about {seconds:.0f} s"
            for step, seconds in self.step_seconds.items()
            if step.endswith("engine") or " engine " in step
        ]
        lines += [
            f"bundle            about {self.bundle_bytes / 1e6:,.0f} MB",
            f"memory            about {self.peak_bytes / 1e9:.1f} GB",
            f"time              about {sum(self.step_seconds.values()):.0f} s on two cores",
        ]
        lines += [
            f"assumed           {each.field} = {each.value} (from {each.source})"
            for each in self.spec.assumptions
        ]
        if self.destination:
            lines.append(self.destination)
        return "\n".join(lines)


def make_estimate(
    spec: ModelSpec,
    parameters: Mapping[str, int],
    dtype: WeightsDType,
    engines: Mapping[str, str] = MappingProxyType({}),
) -> Estimate:
    """Return the estimates for a checkpoint.

    Args:
        spec: The model.
        parameters: Number of weights per component.
        dtype: How weights are stored.
        engines: The component of every engine to build, by the name of its step.
    """
    width = 2 if dtype == "float16" else 4
    total = sum(parameters.values())
    seconds = {}
    if spec.unet is not None:
        seconds["prediction"] = _PREDICTION_SECONDS + _PREDICTION_SECONDS_PER_PARAMETER * total
    if takes_prompts(spec):
        seconds["tokenizer"] = 0.1
    for name, count in parameters.items():
        seconds[name] = COMPONENTS[name].trace_seconds + _SECONDS_PER_PARAMETER * count
        if name == "vae_encoder":
            seconds[name] += _PREVIEW_SECONDS_PER_PARAMETER * count
    seconds["preview"] = 0.1  # a fit to the encoder's pairs
    seconds["golden"] = _GOLDEN_SECONDS + _GOLDEN_SECONDS_PER_PARAMETER * total
    for step, name in engines.items():
        seconds[step] = _ENGINE_SECONDS + _ENGINE_SECONDS_PER_PARAMETER * parameters[name]
    engine_bytes = sum(2 * parameters[name] for name in engines.values())
    return Estimate(
        spec=spec,
        parameters=dict(parameters),
        step_seconds=seconds,
        bundle_bytes=width * total + _GRAPH_BYTES * len(parameters) + engine_bytes,
        peak_bytes=_BASE_BYTES + int(_BYTES_PER_PARAMETER * max(parameters.values())),
    )


def _needs(spec: ModelSpec) -> str:
    """Return the inputs that requests to a model must have, in brackets."""
    groups = [" or ".join(group) for group in task_record(spec).needs]
    return f" (from {' and '.join(groups)})" if groups else ""
