"""The VQ autoencoders of the small models: their hyperparameters and training configurations.

Without torch, so that image generation need not load it.
"""

from dataclasses import dataclass, replace

from ldm_runtime.specs.networks import AutoencoderSpec
from ldm_runtime.testing import autoencoder_spec
from models.shapes.catalog.learning_rate import Cycle
from models.shapes.data import scenes

VQ = autoencoder_spec(
    kind="vq",
    channels=32,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    z_channels=3,
    embed_dim=3,
    codebook_size=2048,
    latent_scale_factor=1.0,
)
#: For inpainting, as the paper's: it runs at any size without a table of all pixels by all pixels.
VQ_WITHOUT_ATTENTION = replace(VQ, middle_attention=False)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """An autoencoder and its training configuration.

    Attributes:
        run: Name in the log and of the saved state.
        spec: Its hyperparameters.
        cycles: Its steps and learning rates.
        quantised_from: First step with a codebook, which is laid out then; 0 takes it from the
            start weights.
        revived_until: Step from which the codebook only follows, so that its average converges.
        whole_from: First step on whole images; before, on crops of 32x32, which are cheaper but
            normalise differently: backgrounds come back too light or too dark until then.
    """

    run: str
    spec: AutoencoderSpec
    cycles: tuple[Cycle, ...]
    quantised_from: int
    revived_until: int
    whole_from: int

    def batch_at(self, step: int) -> tuple[int, int]:
        """Return how many images a step takes and how many pixels per side."""
        return (4, scenes.SIZE) if step >= self.whole_from else (8, scenes.SIZE // 2)


WITH_ATTENTION = AutoencoderConfig(
    run="vq",
    spec=VQ,
    cycles=(
        Cycle(end=6500, learning_rate=1.5e-3),
        Cycle(start=5000, end=8000, learning_rate=1e-3),
    ),
    quantised_from=1000,
    revived_until=6500,
    whole_from=5000,
)
#: Begins with the weights of the other, and unlearns the attention.
WITHOUT_ATTENTION = AutoencoderConfig(
    run="vq_noattn",
    spec=VQ_WITHOUT_ATTENTION,
    cycles=(Cycle(end=1000, learning_rate=7e-4),),
    quantised_from=0,
    revived_until=500,
    whole_from=0,
)
