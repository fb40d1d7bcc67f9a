"""Models that the UNet of the shapes model became, as Stable Diffusion's did.

Each goes on from the shapes model's averaged weights, and its checkpoint has the UNet alone: its
autoencoder and its text encoder are those of `shapes.ckpt`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from ldm_runtime.specs.networks import UNetSpec
from models.shapes.catalog.learning_rate import Cycle
from models.shapes.catalog.noise import TOLD, TOLD_ZERO_SNR, Noise
from models.shapes.catalog.shapes_unet import UNET

_RATE = 2e-3


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One descendant of the shapes model.

    Attributes:
        name: Of its checkpoint, and its training run in the log.
        task: Its task.
        unet: Its UNet; channels that the shapes model's has not begin at zero.
        noise: The noise that it learns to remove.
        most_rows: It learns from at most that many scenes.
        cycles: Its training steps, and their learning rates.
        layout_steps: Ranges of steps in which high noise weighs more.
        markers: Names of empty tensors by which its file says what its other tensors cannot; its
            configuration leaves that out.
        sampling: The sampling defaults of its bundle, as fields of a request.
    """

    name: str
    task: Literal["text-to-image", "text-inpainting"]
    unet: UNetSpec = UNET
    noise: Noise = TOLD
    most_rows: int = 40_000
    cycles: tuple[Cycle, ...]
    layout_steps: tuple[range, ...]
    markers: tuple[str, ...] = ()
    sampling: Mapping[str, str | float]


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        variant.name: variant
        for variant in (
            # Latents, then a mask and the latents of the image without what it hides.
            Variant(
                name="shapes_inpainting",
                task="text-inpainting",
                unet=replace(UNET, in_channels=9),
                most_rows=16_000,
                cycles=(Cycle(end=3000, learning_rate=_RATE),),
                layout_steps=(range(1000),),
                sampling=MappingProxyType(
                    {
                        "sampler": "ddim",
                        "num_inference_steps": 50,
                        "eta": 1.0,
                        "guidance_scale": 3.0,
                    }
                ),
            ),
            # Marked as files of SDXL are whose sampling begins with noise and nothing else.
            Variant(
                name="shapes_zero_snr",
                task="text-to-image",
                noise=TOLD_ZERO_SNR,
                cycles=(Cycle(end=3000, learning_rate=_RATE),),
                layout_steps=(range(2000),),
                markers=("v_pred", "ztsnr"),
                sampling=MappingProxyType(
                    {
                        "sampler": "ddim",
                        "schedule": "trailing",
                        "num_inference_steps": 50,
                        "eta": 1.0,
                        "guidance_scale": 3.0,
                    }
                ),
            ),
        )
    }
)
