"""The noise that UNets here learn to remove. Without torch: image generation reads it, too."""

from dataclasses import dataclass, replace

NUM_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The noise that a UNet learns to remove.

    Attributes:
        start: First beta; betas are linear in their square root.
        end: Last beta.
        offset: Spread of what all of a channel's noise has in common. Sampling begins without: the
            mean of what it begins with is near that of gray backgrounds, which a model that
            is not told the background then generates too often.
        zero_terminal_snr: Whether the schedule is rescaled so that its last timestep is noise and
            nothing else (Lin et al. 2023, arXiv:2305.08891, algorithm 1).
    """

    start: float
    end: float
    offset: float
    zero_terminal_snr: bool = False

    @property
    def schedule(self) -> tuple[float, float, int]:
        """Its schedule in a configuration: first beta, last beta, number of timesteps."""
        return self.start, self.end, NUM_TRAIN_TIMESTEPS


#: For models that are told the background: that of Stable Diffusion, and an offset. Even the last
#: timestep's mean gives the background away, which the offset hides, so that what says the
#: background is listened to.
TOLD = Noise(start=0.00085, end=0.012, offset=0.15)
#: The same with zero terminal SNR: no mean is left that gives the background away.
TOLD_ZERO_SNR = replace(TOLD, offset=0.0, zero_terminal_snr=True)
#: For models that are not: that of the paper's models for faces, whose last timestep is noise and
#: nothing else.
UNTOLD = Noise(start=0.0015, end=0.0195, offset=0.0)
