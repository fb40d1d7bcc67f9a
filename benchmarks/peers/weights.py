"""The same random weights in the form that each entrant reads, made once by the peer's own tool."""

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ldm_runtime.specs.networks import AutoencoderSpec, TextEncoderSpec, UNetSpec
from peers.entrants import WORKERS
from peers.environment import run_in
from released.cached_models import cached_folder, cached_model, random_bundle, random_checkpoint
from released.compvis_files import clip_config, compvis_config, write_clip_vocabulary
from released.records import ReleasedModel

#: The one model with a form for every peer.
MODEL = "sd15"
#: Of Euler's method: timesteps that all programs can visit.
SCHEDULE = "trailing"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of Stable Diffusion 1.5, or of its narrow likeness.

    Attributes:
        narrow: Whether the layers are narrow, to try the programs out.
    """

    narrow: bool = False

    @property
    def folder(self) -> Path:
        """Where all forms are kept."""
        return cached_folder(MODEL, narrow=self.narrow)

    @property
    def model(self) -> ReleasedModel:
        """The hyperparameters."""
        return cached_model(MODEL, narrow=self.narrow)

    def form(self, name: str) -> Path:
        """Return the path of a form, which is made if it is not there.

        Raises:
            LdmError: It cannot be made.
        """
        if name == "checkpoint":
            return random_checkpoint(MODEL, narrow=self.narrow)
        if name == "bundle":
            return random_bundle(MODEL, narrow=self.narrow)
        path = self.folder / name
        if not path.is_dir():
            print(f"writing {path}, once", file=sys.stderr, flush=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="partial-", dir=self.folder) as place:
                partial = Path(place) / name
                partial.mkdir()
                _WRITERS[name](self, partial)
                partial.rename(path)
        return path


def _write_diffusers(weights: Weights, out: Path) -> None:
    """Write diffusers' folder with its own reader of checkpoints."""
    model = weights.model
    networks = model.networks
    (out / "tokenizer").mkdir()
    write_clip_vocabulary(out / "tokenizer")
    job = {
        "checkpoint": str(weights.form("checkpoint")),
        "out": str(out),
        "original_config": compvis_config(networks.of(UNetSpec), networks.of(AutoencoderSpec)),
        "text_encoder": clip_config(networks.of(TextEncoderSpec)),
        "scheduler": {
            "beta_start": model.linear_start,
            "beta_end": model.linear_end,
            "beta_schedule": "scaled_linear",
            "timestep_spacing": SCHEDULE,
        },
    }
    run_in("diffusers", [str(WORKERS / "write_diffusers.py"), json.dumps(job)])


def _write_openvino(weights: Weights, out: Path) -> None:
    """Let optimum-intel export; fp16 is how weights are stored, as in the bundle."""
    options = ["--task", "text-to-image", "--weight-format", "fp16", "--library", "diffusers"]
    _optimum("openvino_genai", "openvino", weights, out, *options)


def _write_onnx(weights: Weights, out: Path) -> None:
    """Let optimum-onnx export, in fp32."""
    _optimum("optimum_onnx", "onnx", weights, out, "--task", "text-to-image")


def _optimum(environment: str, kind: str, weights: Weights, out: Path, *options: str) -> None:
    model = str(weights.form("diffusers"))
    command = ["-m", "optimum.commands.optimum_cli", "export", kind, "--model", model]
    run_in(environment, [*command, *options, str(out)])


_WRITERS: Mapping[str, Callable[[Weights, Path], None]] = {
    "diffusers": _write_diffusers,
    "openvino": _write_openvino,
    "onnx": _write_onnx,
}
