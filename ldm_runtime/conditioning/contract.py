"""Conditioning of the UNet, and the interface of the conditioners that encode it."""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ldm_runtime.backends.contract import Runner
from ldm_runtime.requests.resolved import ResolvedRequest
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.text import Tokenizer

Float32Array = npt.NDArray[np.float32]
#: Returns a network of the bundle by the name of its component.
OpenNetwork = Callable[[str], Runner]


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditioning:
    """Inputs of the UNet in addition to latents and timesteps, for one image or for all alike.

    Attributes:
        context: Keys and values of cross-attention: (2, T, D), unconditional first, with guidance,
            or (1, T, D) without, or a row for each of `ResolvedRequest.guidance.samples`; None for
            a model without cross-attention.
        vector: Added to the time embedding, with rows like the context; None for a model without.
        image_vectors: In its place (samples, images, V), where each image of a request has its own.
        class_labels: Class (1,) int64 for all samples, likewise; None for a model without.
        guidance: Features of the guidance scale, (1, G); None for a model without.
        concat: Channels concatenated to the latents: (1, c, h, w) for all samples, or with rows
            like the context; None for a model without.
        edits: The conditioning from a step on, by its number, if the prompts change there; itself
            without edits, and one object for all steps that see the same. Steps are numbered as in
            `requests.scheduled_prompts`.
    """

    context: Float32Array | None = None
    vector: Float32Array | None = None
    image_vectors: Float32Array | None = None
    class_labels: npt.NDArray[np.int64] | None = None
    guidance: Float32Array | None = None
    concat: Float32Array | None = None
    edits: Mapping[int, "Conditioning"] = field(default_factory=dict)

    def at(self, step: int) -> "Conditioning":
        """Return the conditioning of a step, one object for all steps that see the same."""
        index = bisect_right(self._edited_steps, step)
        return self.edits[self._edited_steps[index - 1]] if index else self

    def changed(self, change: Callable[["Conditioning"], "Conditioning"]) -> "Conditioning":
        """Return the conditioning with a change made to it, and to that of every edit."""
        changed = {id(each): change(each) for each in self.edits.values()}
        edits = {step: changed[id(each)] for step, each in self.edits.items()}
        return replace(change(self), edits=edits)

    @cached_property
    def _edited_steps(self) -> list[int]:
        return sorted(self.edits)

    def of_images(self, images: range) -> "Conditioning":
        """Return the conditioning of some images of a request as one batch.

        It has a row for each sample of each image: first the first sample of all images.
        """
        parts = {each.name: getattr(self, each.name) for each in fields(self)}
        del parts["image_vectors"], parts["edits"]
        present = {name: rows for name, rows in parts.items() if rows is not None}
        samples, count = max(map(len, present.values()), default=0), len(images)
        repeated: dict[str, Any] = {
            name: np.repeat(rows, count * samples // len(rows), axis=0)
            for name, rows in present.items()
        }
        if self.image_vectors is not None:
            own = self.image_vectors[:, images.start : images.stop]
            repeated["vector"] = own.reshape(-1, own.shape[-1])
        return replace(self, **repeated, image_vectors=None)


Encode = Callable[[OpenNetwork, Tokenizer | None, ResolvedRequest, ModelSpec], Conditioning]


class Conditioner(NamedTuple):
    """Conditioner of a task: it turns requests into conditioning.

    Attributes:
        encode: Takes networks by name, the bundle's tokenizer, a resolved request and the model.
        others: The components it needs in addition to the model's conditioners.
    """

    encode: Encode
    others: tuple[str, ...] = ()


def with_noise(values: Float32Array, noise: Float32Array, kept: float) -> Float32Array:
    """Return values under noise of unit variance, of which a share is kept in the square.

    Source: Ho et al. 2020 (arXiv:2006.11239), equation 4.
    """
    return np.float32(np.sqrt(kept)) * values + np.float32(np.sqrt(1 - kept)) * noise
