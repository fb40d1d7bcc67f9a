"""Write docs/samplers.md from the code and its tests: `python -m scripts.sampler_page`.

Runs every sampler next to its diffusers reference to measure how far they are apart, which takes a
minute and needs the packages of the tests.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ldm_runtime.requests.presets import PRESETS, Preset
from ldm_runtime.samplers import SAMPLERS, SamplerRecord
from ldm_runtime.schedules import SCHEDULES, training_sigmas
from scripts.pages import write_page

PAGE = Path(__file__).resolve().parent.parent / "docs/samplers.md"
COLUMNS = (
    "name",
    "source",
    "order",
    "calls per step",
    "eta",
    "schedule",
    "ends at",
    "diffusers reference",
    "largest difference",
)

_INTRODUCTION = """\
# Samplers and schedules

<!-- Written by `python -m scripts.sampler_page`; change the code or that script, not this page. -->

A sampler carries noisy latents down a list of sigmas; a schedule makes the list. They are chosen
apart: `ldm generate --sampler heun --schedule karras`.

Names of other programs are understood, on the command line and in a `GenerationRequest`, and
recorded as the names below: A1111's `"DPM++ 2M Karras"` (which sets the schedule too, unless one is
given), k-diffusion's `sample_dpmpp_2m`, diffusers' `EulerAncestralDiscreteScheduler`. Such a name
chooses the sampler alone: which timesteps a schedule visits, and where the last step ends, stays as
it is here.

## Samplers

* **order**: the error of a whole run without noise falls with this power of the number of steps,
  as `tests/runtime/test_samplers_convergence.py` measures on a Gaussian. The first steps of a
  multistep sampler know no earlier ones and cost it the order of its formula: `lms` has 4 and
  `deis` 3 from a fine start. `plms` and `ipndm` take all steps for equally long, and where the
  lengths of neighbouring steps differ much they fall to order 1. `lms` in several hundred steps of
  `karras` or `exponential` ends in a step so much longer than the others that float32's rounding
  grows to hundredths, as in k-diffusion: make at most 100 steps, or take another sampler.
* **calls per step**: denoiser calls, each of the size of the batch (twice with guidance). `plms`
  makes one call more in its first step; samplers with two calls make one in a step to sigma 0.
* **eta**: whether the share of fresh noise can be chosen, and what it is unless given.
* **ends at**: 0, or the smallest training sigma, as LDM's DDIM and PLMS do.
* **largest difference** to the diffusers scheduler, after any step, over the largest latent, in
  float64 with the same noise: on three schedules (leading, trailing, Karras), for epsilon and
  v-prediction, in up to 20 steps. Most of it is diffusers' rounding to float32. What a scheduler is
  made to do for that is said in `sampler_twin_table.py` and `dpm_twin_table.py` in
  `tests/reference` and shown by `test_sampler_differences_reference.py` and
  `test_dpm_solver_reference.py` there.
  `dpmpp_2s_ancestral` has a reference without noise only. The tests in `tests/runtime` compare it,
  with noise and as all others, with the formulas of its source.
"""

_SCHEDULES = """
## Schedules

"""

_CUSTOM = """
The schedule of a request that lists its noise levels in `sigmas` is called `custom`. Without them
`custom` is an error.
"""

_EDM = """
## Models of EDM

Playground 2.5 and CosXL were trained on a range of noise levels and not on timesteps (Karras et al.
2022, arXiv:2206.00364). They take the schedules that go by sigma, `karras`, `exponential` and
`polyexponential`, from the highest noise level to the lowest, and listed `sigmas`; and every
sampler but `tcd`, which goes by timesteps. Unless a request says otherwise the schedule is the
model's with every sampler: `karras` for Playground 2.5, `exponential` for CosXL. `dpmpp_2m` is
diffusers' `EDMDPMSolverMultistepScheduler` and `euler` its `EDMEulerScheduler`: what differs is the
first noise, which those multiply by sqrt(sigma² + 1) and these by sigma.
"""

_PRESETS = """
## Presets

The settings that distilled models were released with: `ldm-export --preset NAME` makes them the
defaults of a bundle, `ldm generate --preset NAME` and `preset="NAME"` those of one request. All are
without guidance: `guidance_scale` is 1, which diffusers calls 0. The column "predicts" says where
the UNet predicts something else than its base. `tests/reference/test_presets_reference.py` compares
every step with the scheduler that the source names.

"""

_LDM_STEPS = """
## The number of steps in LDM

LDM's DDIM and PLMS visit every k-th timestep, where k is 1000 // S for S steps. If S does not
divide 1000 there may be more of them than asked for, and for some S the last one does not exist.
The default, `leading`, makes S steps with the same k; `ldm` does what LDM does, and an image
records the number asked for:

| asked for | `leading` | `ldm` |
|---|---|---|
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page."""
    importlib.import_module("diffusers.utils.logging").set_verbosity_error()
    return write_page(__doc__, PAGE, partial(page, largest_difference), argv)


def page(difference_of: Callable[[str], float]) -> str:
    """Return the page, the last column from a function of the sampler's name."""
    rows = [_row(name, record, difference_of) for name, record in SAMPLERS.items()]
    table = [_line(COLUMNS), _line(["---"] * len(COLUMNS)), *map(_line, rows)]
    schedules = [
        f"* `{name}`: {(schedule.__doc__ or '').splitlines()[0]}\n"
        for name, schedule in SCHEDULES.items()
    ]
    parts = [
        _INTRODUCTION,
        "\n",
        *table,
        _SCHEDULES,
        *schedules,
        _CUSTOM,
        _EDM,
        _PRESETS,
        *_presets(),
    ]
    return "".join([*parts, _LDM_STEPS, *_ldm_steps()])


def largest_difference(name: str) -> float:
    """Measure the largest difference between a sampler and its references; NaN if it has none."""
    references = _references_of(name)
    return (
        float(_tests("sampler_twins").measured_difference(references))
        if references
        else float("nan")
    )


def _row(
    name: str, record: SamplerRecord, difference_of: Callable[[str], float]
) -> tuple[str, ...]:
    order = str(record.order) if record.uses_eta or not record.default_eta else "–"
    schedulers = dict.fromkeys(f"`{each.scheduler.__name__}`" for each in _references_of(name))
    return (
        f"`{name}`",
        record.source,
        order,
        str(record.calls_per_step),
        _eta(record),
        f"`{record.schedule}`",
        {"zero": "0", "smallest": "smallest"}[record.final_sigma],
        ", ".join(schedulers) or "none",
        f"{difference_of(name):.0e}",
    )


def _eta(record: SamplerRecord) -> str:
    if record.uses_eta:
        return f"yes, {record.default_eta:g}"
    return "no, always noise" if record.default_eta else "no"


def _presets() -> list[str]:
    columns = ("name", "for", "sampler", "schedule", "steps", "eta", "predicts", "source")
    rows = [
        (
            f"`{row.name}`",
            row.models,
            f"`{row.sampler}`",
            f"`{row.schedule}`",
            str(row.num_inference_steps),
            _eta_of(row),
            row.prediction_type or "as its base",
            f"[{row.source.split('/', 3)[-1]}]({row.source})",
        )
        for row in PRESETS.values()
    ]
    return [_line(columns), _line(["---"] * len(columns)), *map(_line, rows)]


def _eta_of(preset: Preset) -> str:
    return f"{preset.eta:g}" if SAMPLERS[preset.sampler].uses_eta else "–"


def _ldm_steps() -> list[str]:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # only their number matters here
    table = training_sigmas(np.cumprod(1 - betas).tolist())
    made = {
        count: [len(SCHEDULES[name](table, count)) for name in ("leading", "ldm")]
        for count in (20, 30, 50, 75, 150, 200)
    }
    return [_line([str(count), *map(str, steps)]) for count, steps in made.items()]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _references_of(name: str) -> list[Any]:
    tables = _tests("sampler_twin_table").TWINS + _tests("dpm_twin_table").DPM_TWINS
    return [each for each in tables if each.name == name]


def _tests(module: str) -> ModuleType:
    return importlib.import_module(f"tests.reference.{module}")


if __name__ == "__main__":
    sys.exit(main())
