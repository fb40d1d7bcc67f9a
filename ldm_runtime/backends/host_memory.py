"""Host memory: a lower bound of what a run needs, compared with what is available.

Linux overcommits memory and kills the process that uses it, without a message. An image that
cannot fit is therefore refused before its network runs.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from ldm_runtime.backends.control_groups import ControlGroups
from ldm_runtime.errors import BackendError
from ldm_runtime.specs.components import COMPONENTS
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.networks import AutoencoderSpec, UNetSpec
from ldm_runtime.specs.tasks import task_record

_FLOAT32_BYTES = 4
_NEGLIGIBLE_BYTES = 100_000_000  # always available, and checking takes time
_MEMINFO, _GROUPS = Path("/proc/meminfo"), ControlGroups()


def check_memory(
    name: str,
    spec: ModelSpec,
    lengths: Mapping[str, int],
    held: int = 0,
    *,
    keeps_scores: bool = True,
) -> int:
    """Refuse a run that this machine has no memory for.

    Args:
        name: Of the network.
        spec: The model.
        lengths: Of the network's axes in this run.
        held: The return value for an earlier run. An engine keeps the memory that it once
            allocated, so that a run that needs no more than that allocates nothing.
        keeps_scores: See `least_bytes`.

    Returns:
        Bytes of the run's largest tensor, or `held` if that is more.

    Raises:
        BackendError: Its largest tensor alone exceeds the available memory.
    """
    wanted = least_bytes(name, spec, lengths, keeps_scores=keeps_scores)
    if wanted <= max(held, _NEGLIGIBLE_BYTES) or wanted - held <= (there := available_bytes()):
        return max(held, wanted)
    batch, height, width = _batch_and_pixels(spec.autoencoder, lengths)
    times = f"{batch} times " if batch > 1 else ""
    tiles = ", or for tiles (tile_size)" if _decodes_in_tiles(name, spec) else ""
    raise BackendError(
        f"{name} takes at least {wanted / 1e9:,.1f} GB for {times}{width}x{height} pixels, "
        f"but there are {(there + held) / 1e9:,.1f} GB for it; ask for fewer or smaller images"
        f"{tiles}"
    )


def least_bytes(
    name: str, spec: ModelSpec, lengths: Mapping[str, int], *, keeps_scores: bool = True
) -> int:
    """Return the bytes of the largest tensor of one run, in float32: a lower bound of its need.

    That is either all features of the first level or the scores of one attention, of every pixel
    with every other. For the UNet and the autoencoder; 0 for the others, which need little.

    Args:
        name: Of the network.
        spec: The model.
        lengths: Of the network's axes in this run.
        keeps_scores: Whether all scores of an attention are in memory at once. They are not where a
            library computes attention block by block (Dao et al., FlashAttention).
    """
    if name == "unet" and spec.unet is not None:
        sides = lengths["height"], lengths["width"]
        features, scores = _unet_features(spec.unet, *sides), _unet_scores(spec.unet, *sides)
    elif isinstance(record := spec.networks[COMPONENTS[name].network], AutoencoderSpec):
        sides = _batch_and_pixels(record, lengths)[1:]
        features = record.channels * record.channel_mult[0] * math.prod(sides)
        scores = _autoencoder_scores(record, *sides)
    else:
        return 0
    values = max([features, *scores]) if keeps_scores else features
    return _FLOAT32_BYTES * lengths["batch"] * values


def available_bytes(*, swap: bool = True) -> float:
    """Return the bytes of memory that are available to a process; infinity where unknown.

    Under a limit of Linux's control groups, as in containers, no more than that limit; how much of
    it is in use already is not known here.

    Args:
        swap: Whether free swap space counts.
    """
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return float("inf")
    kilobytes = {
        name: int(digits[0])
        for name, _, value in (line.partition(":") for line in lines)
        if (digits := value.split()) and digits[0].isdecimal()
    }
    free = 1024 * kilobytes.get("MemAvailable", float("inf"))
    spare = 1024 * kilobytes.get("SwapFree", 0) if swap else 0
    return min(free, _GROUPS.memory_bytes()) + spare


def _decodes_in_tiles(name: str, spec: ModelSpec) -> bool:
    return COMPONENTS[name].role == "decoder" and "tile_size" in task_record(spec).takes


def _batch_and_pixels(spec: AutoencoderSpec, lengths: Mapping[str, int]) -> tuple[int, int, int]:
    """Return batch, height and width in pixels."""
    if "image_height" in lengths:
        return lengths["batch"], lengths["image_height"], lengths["image_width"]
    return lengths["batch"], lengths["height"] * spec.factor, lengths["width"] * spec.factor


def _unet_features(spec: UNetSpec, height: int, width: int) -> int:
    return spec.model_channels * spec.channel_mult[0] * height * width


def _unet_scores(spec: UNetSpec, height: int, width: int) -> Iterator[int]:
    last = len(spec.channel_mult) - 1
    for level, mult in enumerate(spec.channel_mult):
        depths = (*spec.input_depths(level), *spec.output_depths(level))
        if any(depths) or (level == last and spec.middle_depth):
            heads = spec.heads_over(mult * spec.model_channels)
            yield heads * ((height >> level) * (width >> level)) ** 2


def _autoencoder_scores(spec: AutoencoderSpec, height: int, width: int) -> Iterator[int]:
    middle = [len(spec.channel_mult) - 1] if spec.middle_attention else []
    for level in (*spec.attention_levels, *middle):
        yield ((height >> level) * (width >> level)) ** 2
