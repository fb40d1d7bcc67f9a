"""Feature reuse: a UNet that in some calls computes its outermost blocks alone.

What the blocks between them compute changes little from step to step of sampling. One call of the
whole UNet therefore serves several steps: the others take its deep features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import numpy as np
import numpy.typing as npt

from ldm_runtime.backends.contract import Runner, Tensors, bind_constants
from ldm_runtime.pipeline.open_model import OpenModel
from ldm_runtime.requests.resolved import NoReuse, Reuse, ReuseByInterval
from ldm_runtime.specs.model import components_of

Float32Array = npt.NDArray[np.float32]

_SHALLOW = "unet_shallow"


def open_unet(
    model: OpenModel, reuse: Reuse, shared: Callable[[Runner], Runner] = lambda unet: unet
) -> Runner:
    """Return the UNet of a model for one run of a denoiser.

    Args:
        model: The model; with a rule of reuse it has a graph of the outermost blocks.
        reuse: Which calls compute the whole.
        shared: Returns a network as the run is to see it.
    """
    whole = shared(model.network("unet"))
    if isinstance(reuse, NoReuse):
        return whole
    inputs = components_of(model.spec)[_SHALLOW].inputs
    return ReusingUNet(
        whole=whole,
        shallow=shared(model.network(_SHALLOW)),
        reuse=reuse,
        shallow_inputs=frozenset(each.name for each in inputs),
        kept=_Kept(),
    )


@dataclass(kw_only=True, eq=False)
class _Kept:
    """The last call of the whole UNet, which those that `bind` returned share.

    Attributes:
        owner: The UNet that made it, with the constants that it was made with.
        latents: What it saw, (B, C, h, w) …
        features: … and its deep features (B, D, h, w).
        calls: Calls since then, itself included.
        rate: Change of the features per change of the latents, between the last two such calls;
            None after one.
    """

    owner: "ReusingUNet | None" = None
    latents: Float32Array | None = None
    features: Float32Array | None = None
    calls: int = 0
    rate: float | None = None

    def keep(self, owner: "ReusingUNet", latents: Float32Array, features: Float32Array) -> None:
        """Take over a call of the whole UNet."""
        is_next = self.owner is owner and self.latents is not None and self.features is not None
        moved = _distance(latents, self.latents) if is_next else 0.0
        self.rate = _distance(features, self.features) / moved if moved else None
        self.owner, self.latents, self.features, self.calls = owner, latents, features, 1

    def change(self, latents: Float32Array) -> float:
        """Predict how far the features have changed since, relative to their size.

        Source: the rate is that of Zhou et al. 2025, EasyCache (arXiv:2507.02860), which sums the
        changes of a transformer's output from step to step; here it is one change, of features.
        """
        size = 0.0 if self.features is None else float(np.abs(self.features).mean())
        if self.rate is None or not size:
            return inf
        return self.rate * _distance(latents, self.latents) / size


@dataclass(frozen=True, kw_only=True, eq=False)
class ReusingUNet:
    """A UNet, as one run of a denoiser sees it, that reuses the deep features of earlier calls.

    The first call computes the whole, and so does one with other constants than the call before:
    where guidance begins or ends the batch size changes, and where the prompt does, the features.
    A sampler that calls the UNet twice in a step counts both.

    Source: Ma et al. 2023, DeepCache (arXiv:2312.00858), with a uniform interval.

    Attributes:
        whole: The whole UNet, which also gives its deep features.
        shallow: Its outermost blocks, which take them.
        reuse: Which calls compute the whole.
        shallow_inputs: Names of the inputs of `shallow`.
        kept: The last call of the whole.
    """

    whole: Runner
    shallow: Runner
    reuse: Reuse
    shallow_inputs: frozenset[str]
    kept: _Kept

    def run(self, inputs: Tensors) -> Tensors:
        """Run once; see `ldm_runtime.backends.contract.Runner`."""
        latents = inputs["latents"]
        if self._is_due(latents):
            outputs = self.whole.run(inputs)
            self.kept.keep(self, latents, outputs["deep_features"])
            return outputs
        assert self.kept.features is not None, "the first call is one of the whole"
        self.kept.calls += 1
        return self.shallow.run({**self._of_shallow(inputs), "deep_features": self.kept.features})

    def bind(self, constants: Tensors) -> Runner:
        """Return this UNet with some inputs fixed, which knows of the same last call."""
        mine = self._of_shallow(constants)
        return ReusingUNet(
            whole=bind_constants(self.whole, constants),
            shallow=bind_constants(self.shallow, mine) if mine else self.shallow,
            reuse=self.reuse,
            shallow_inputs=self.shallow_inputs,
            kept=self.kept,
        )

    def _of_shallow(self, tensors: Tensors) -> Tensors:
        return {name: each for name, each in tensors.items() if name in self.shallow_inputs}

    def _is_due(self, latents: Float32Array) -> bool:
        """Return whether the next call is one of the whole."""
        if self.kept.owner is not self or isinstance(self.reuse, NoReuse):
            return True
        if isinstance(self.reuse, ReuseByInterval):
            return self.kept.calls >= self.reuse.interval
        return self.kept.change(latents) >= self.reuse.threshold


def _distance(one: Float32Array, other: Float32Array | None) -> float:
    """Return the mean absolute difference."""
    assert other is not None
    return float(np.abs(one - other).mean())
