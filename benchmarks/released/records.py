"""The record of a released model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ldm_runtime.specs.model import Task
from ldm_runtime.specs.networks import Networks


@dataclass(frozen=True, kw_only=True)
class ReleasedModel:
    """One released model.

    Attributes:
        name: Of its folder, or of the first of those that share the row.
        task: Its task.
        networks: Hyperparameters of its networks by name.
        linear_start: First beta of the schedule, which is linear in its square root.
        linear_end: Last beta.
        scale_by_std: Whether the scale factor is a tensor of the checkpoint.
        half: Whether the released file has fp16 weights.
        prefixes: Beginning of a component's parameter names in the checkpoint, where it is not that
            of CompVis' first models.
        unused: Weights of the checkpoint that no component has: names and shapes.
        parameters_millions: Counts of the sources, to check this table with: of the UNet, the
            autoencoder and the conditioner, output layers that nothing uses included.
    """

    name: str
    task: Task
    networks: Networks
    linear_start: float = 0.0015
    linear_end: float = 0.0195
    scale_by_std: bool = False
    half: bool = False
    prefixes: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    parameters_millions: tuple[float, float, float]
