"""The models: networks, data and training configuration of each."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from ldm_runtime.specs.model import Task
from ldm_runtime.specs.networks import (
    ClassEmbedderSpec,
    SegmentationEncoderSpec,
    TextEncoderSpec,
    UNetSpec,
)
from ldm_runtime.testing import text_encoder_spec, unet_spec
from models.shapes.catalog.autoencoders import WITH_ATTENTION, WITHOUT_ATTENTION, AutoencoderConfig
from models.shapes.catalog.learning_rate import Cycle
from models.shapes.catalog.noise import TOLD, UNTOLD, Noise
from models.shapes.data.labels import NUM_CLASSES, NUM_LABELS

MUON_RATE = 3e-3
CONTEXT_DIM = 64
NUM_DOWNSAMPLING_STEPS = 2
_LATENT_CHANNELS = 3

#: Self-attention at 8x8, 4x4 and in the middle, as the paper's models for faces have it.
_PLAIN = unet_spec(
    in_channels=_LATENT_CHANNELS,
    out_channels=_LATENT_CHANNELS,
    model_channels=64,
    channel_mult=(1, 1, 2),
    num_res_blocks=1,
    attention="qkv",
    transformer_depth=(0, 1, 1),
    num_heads=4,
    context_dim=None,
)
_CROSS = replace(_PLAIN, attention="transformer", context_dim=CONTEXT_DIM)
#: Next to an encoder there is no room for a third level of 128 channels.
_SLIM = replace(_CROSS, channel_mult=(1, 1, 1))

#: Heads of a BERT encoder have 64 channels and there are 8, whatever the width.
BERT = text_encoder_spec(
    kind="bert",
    width=CONTEXT_DIM,
    num_layers=3,
    num_heads=8,
    feed_forward_dim=4 * CONTEXT_DIM,
    vocab_size=30522,
    activation="gelu",
    pad_token_id=0,
)
#: Thirty objects of three tokens, and the crop.
LAYOUT = replace(
    BERT, num_layers=2, context_layers=2, vocab_size=8192, max_tokens=92, pad_token_id=8191
)
#: The last class is none.
CLASSES = ClassEmbedderSpec(num_classes=NUM_LABELS + 1, width=CONTEXT_DIM, null_class=NUM_LABELS)
SEGMENTATION_ENCODER = SegmentationEncoderSpec(
    num_classes=NUM_CLASSES,
    out_channels=_LATENT_CHANNELS,
    num_downsampling_steps=NUM_DOWNSAMPLING_STEPS,
)


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """One trained example: its networks, data and training configuration.

    Attributes:
        name: Of its checkpoint, and its training run in the log.
        task: Its task.
        unet: Its UNet.
        autoencoder: Its autoencoder, and where that comes from.
        encoder: Of words or layouts; trained by itself and left as it is.
        embedder: Of classes; trained with the UNet.
        segmentation_encoder: Of segmentation maps; trained with the UNet.
        most_things: It learns from scenes of at most that many things.
        most_rows: It learns from at most that many scenes.
        begins_with: Another of the same UNet, whose averaged weights this one goes on from.
        noise: The noise that it learns to remove.
        cycles: Its training steps, and their learning rates.
        layout_steps: Ranges of steps in which high noise weighs more, which decides the
            layout; also after a restart, if the layout is still wrong.
        optimizer: Muon is for the matrices inside the UNet; AdamW takes the rest, or all.
        num_inference_steps: Of the images by which it is evaluated.
        guidance_scale: Of the images by which it is watched and evaluated.
        eta: Share of fresh noise in each of their steps. With it, many steps correct what the
            first ones put in the wrong place.
    """

    name: str
    task: Task
    unet: UNetSpec
    autoencoder: AutoencoderConfig = WITH_ATTENTION
    encoder: TextEncoderSpec | None = None
    embedder: ClassEmbedderSpec | None = None
    segmentation_encoder: SegmentationEncoderSpec | None = None
    most_things: int = 3
    most_rows: int = 40_000
    begins_with: str | None = None
    noise: Noise = TOLD
    cycles: tuple[Cycle, ...]
    layout_steps: tuple[range, ...]
    optimizer: Literal["muon", "adamw"] = "muon"
    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    eta: float = 0.0

    @property
    def sampling(self) -> Mapping[str, str | float]:
        """The sampling defaults of its bundle, as fields of a request."""
        steps = {"num_inference_steps": self.num_inference_steps, "eta": self.eta}
        guidance = {"guidance_scale": self.guidance_scale} if self.drops else {}
        return {"sampler": "ddim", **steps, **guidance}

    @property
    def drops(self) -> bool:
        """Whether it learns without its condition, too, which guidance needs."""
        return self.encoder is not None or self.embedder is not None


MODELS: Mapping[str, TrainedModel] = MappingProxyType(
    {
        model.name: model
        for model in (
            # One thing an image, as the paper's unconditional models have one face or one church.
            TrainedModel(
                name="unconditional",
                task="unconditional",
                unet=replace(_PLAIN, scale_shift_norm=True),
                most_things=1,
                noise=UNTOLD,
                cycles=(
                    Cycle(end=3000, learning_rate=MUON_RATE),
                    Cycle(start=3000, end=5000, learning_rate=2e-3),
                    Cycle(start=5000, end=7500, learning_rate=2e-3),
                    Cycle(start=7500, end=12_500, learning_rate=2e-3),
                ),
                layout_steps=(range(1500), range(7500, 10_500)),
                eta=1.0,
            ),
            TrainedModel(
                name="class_to_image",
                task="class-to-image",
                unet=_SLIM,
                embedder=CLASSES,
                most_things=1,
                begins_with="layout_to_image",
                cycles=(
                    Cycle(end=2000, learning_rate=2e-3),
                    Cycle(start=2000, end=3200, learning_rate=1.5e-3),
                    Cycle(start=3200, end=4200, learning_rate=1e-3),
                ),
                layout_steps=(),
                guidance_scale=1.5,
                eta=1.0,
            ),
            TrainedModel(
                name="text_to_image_bert",
                task="text-to-image",
                unet=_SLIM,
                encoder=BERT,
                most_things=2,
                cycles=(
                    Cycle(end=3000, learning_rate=MUON_RATE),
                    Cycle(start=3000, end=5000, learning_rate=2e-3),
                    Cycle(start=5000, end=10_000, learning_rate=2e-3),  # short captions, too
                    Cycle(start=10_000, end=14_500, learning_rate=2e-3),
                ),
                layout_steps=(range(1500), range(10_000, 12_500)),
                guidance_scale=3.0,
                eta=1.0,
            ),
            TrainedModel(
                name="layout_to_image",
                task="layout-to-image",
                unet=_SLIM,
                encoder=LAYOUT,
                cycles=(
                    Cycle(end=7000, learning_rate=MUON_RATE),
                    Cycle(start=1000, end=3500, learning_rate=2e-3),
                ),
                layout_steps=(range(1500),),
                guidance_scale=3.0,
            ),
            # Attention in the middle alone, as the paper's.
            TrainedModel(
                name="semantic_synthesis",
                task="semantic-synthesis",
                unet=replace(
                    _PLAIN,
                    in_channels=2 * _LATENT_CHANNELS,
                    transformer_depth=(0, 0, 0),
                    num_heads=8,
                ),
                segmentation_encoder=SEGMENTATION_ENCODER,
                cycles=(Cycle(end=2000),),
                layout_steps=(range(500),),
                optimizer="adamw",
            ),
            # Attention at the lowest level and in the middle, as the paper's.
            TrainedModel(
                name="super_resolution",
                task="super-resolution",
                unet=replace(
                    _PLAIN,
                    in_channels=_LATENT_CHANNELS + 3,
                    transformer_depth=(0, 0, 1),
                    num_heads=8,
                ),
                cycles=(Cycle(end=2500),),
                layout_steps=(range(500),),
                optimizer="adamw",
            ),
            # The rest of the image, and the mask of the missing part.
            TrainedModel(
                name="inpainting",
                task="inpainting",
                unet=replace(_PLAIN, in_channels=2 * _LATENT_CHANNELS + 1, resblock_updown=True),
                autoencoder=WITHOUT_ATTENTION,
                most_rows=16_000,
                cycles=(
                    Cycle(end=3500, learning_rate=MUON_RATE),
                    Cycle(start=3500, end=5000, learning_rate=2e-3),
                    Cycle(start=5000, end=7500, learning_rate=2e-3),
                    Cycle(start=8000, end=12_000, learning_rate=2e-3),
                    Cycle(start=12_000, end=16_000, learning_rate=2e-3),
                ),
                layout_steps=(
                    range(500),
                    range(5000, 7000),
                    range(8000, 10_500),
                    range(12_000, 14_000),
                ),
            ),
        )
    }
)
