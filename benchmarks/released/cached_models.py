"""Released models with random weights, written and exported once into a folder that Git ignores."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from ldm_runtime.bundle.manifest import load_manifest
from ldm_runtime.errors import LdmError
from ldm_runtime.quantization.quantize import QuantizationOptions, quantize_bundle
from ldm_runtime.quantization.requests import SampleOptions
from measuring.rows import ROOT
from measuring.shapes_bundle import exported_bundle
from measuring.watched_export import run_apart
from released.narrow_models import narrowed
from released.records import ReleasedModel
from released.released_models import MODELS

CACHE = ROOT / ".cache/full-size"
#: The models of `latency.py --model`, by their short names.
SHORT_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "sd15": "v1-5-pruned-emaonly",
        "sdxl": "sd_xl_base_1.0",
        "ldm-txt2img": "txt2img-1p4B",
        "cin256": "cin256-v2",
        "sr": "bsr_sr",
    }
)


def cached_model(name: str, *, narrow: bool = False) -> ReleasedModel:
    """Return a model by its short name, with weights in fp16, as bundles store them by default.

    So a bundle and whatever else is made of the checkpoint have the same weights.
    """
    model = replace(MODELS[SHORT_NAMES[name]], half=True)
    return narrowed(model) if narrow else model


def cached_folder(name: str, *, narrow: bool = False) -> Path:
    """Return the folder of what is kept of a model."""
    return CACHE / (f"{name}-narrow" if narrow else name)


def random_checkpoint(name: str, *, narrow: bool = False) -> Path:
    """Return the checkpoint of a model with random weights, written if it is not there.

    Raises:
        LdmError: It cannot be written.
    """
    path = cached_folder(name, narrow=narrow) / "random.ckpt"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        try:
            run_apart(_write, f"writing {path}", partial, cached_model(name, narrow=narrow))
        except RuntimeError as error:
            raise LdmError(f"{error}; the reason is above") from error
        partial.rename(path)
    return path


def random_bundle(name: str, *, narrow: bool = False) -> Path:
    """Return the bundle of a model with random weights, exported if it is not there.

    Raises:
        LdmError: It cannot be exported.
    """
    checkpoint = random_checkpoint(name, narrow=narrow)
    return exported_bundle(checkpoint, checkpoint.with_name("engines"))


def with_int8(bundle: Path) -> Path:
    """Return a bundle of random weights, with graphs in 8 bits added if it has none.

    What they cost its images means nothing, so that any price will do.

    Raises:
        LdmError: They cannot be made.
    """
    if load_manifest(bundle).quantization is None:
        samples = SampleOptions(measured=1, compared=1, steps=2)
        print(f"adding graphs in 8 bits to {bundle}, once", file=sys.stderr)
        quantize_bundle(bundle, QuantizationOptions(samples=samples, least_psnr=0.0))
    return bundle


def _write(path: Path, model: ReleasedModel) -> None:
    from released.random_checkpoints import write_checkpoint  # which loads torch

    write_checkpoint(path, model)
