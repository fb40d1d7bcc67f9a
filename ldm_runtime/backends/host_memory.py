"""What a run takes of this machine's memory, at the least, and whether that is there.

Linux gives memory that it does not have and kills whoever uses it, without a word. A picture that
cannot fit is therefore refused before its network runs.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from ldm_runtime.errors import BackendError
from ldm_runtime.manifest import AutoencoderSpec, ModelSpec, UNetSpec

_FLOAT32_BYTES = 4
_WORTH_LOOKING = 100_000_000  # bytes
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")


def check_memory(name: str, spec: ModelSpec, lengths: Mapping[str, int]) -> None:
    """Refuse a run that this machine has no memory for.

    Args:
        name: Of the network.
        spec: The model.
        lengths: Of the network's axes in this run.

    Raises:
        BackendError: Even its largest tensor is more than what is free.
    """
    wanted = least_bytes(name, spec, lengths)
    if wanted < _WORTH_LOOKING or wanted <= (free := available_bytes()):
        return
    rows, height, width = _rows_and_pixels(spec.autoencoder, lengths)
    tiles = "" if name == "unet" else ", or for decoding in tiles (tile_size)"
    raise BackendError(
        f"{name} takes at least {wanted / 1e9:,.1f} GB for {rows} x {width}x{height} pixels, but "
        f"{free / 1e9:,.1f} GB of memory are free; ask for fewer or smaller images{tiles}"
    )


def least_bytes(name: str, spec: ModelSpec, lengths: Mapping[str, int]) -> int:
    """Return the bytes of the largest tensor of one run, in float32: a part of what the run takes.

    That is either all features of the first level or one attention's scores, of every pixel with
    every other. Of the UNet and the autoencoder; 0 of networks whose inputs have a bounded size.
    """
    if name == "unet" and spec.unet is not None:
        values = _unet_values(spec.unet, lengths["height"], lengths["width"])
    elif name in {"vae_decoder", "vae_encoder"}:
        values = _autoencoder_values(
            spec.autoencoder, *_rows_and_pixels(spec.autoencoder, lengths)[1:]
        )
    else:
        return 0
    return _FLOAT32_BYTES * lengths["batch"] * max(values)


def available_bytes() -> float:
    """Return the bytes of memory that a program may still take; infinity where nobody says."""
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return float("inf")
    found = {name: value.split()[0] for name, value in (line.split(":", 1) for line in lines)}
    free = 1024.0 * sum(int(found.get(name, 0)) for name in ("MemAvailable", "SwapFree"))
    return min(free, _cgroup_limit())


def _cgroup_limit() -> float:
    try:
        text = _CGROUP.read_text().strip()
    except OSError:
        return float("inf")
    return float(text) if text.isdecimal() else float("inf")


def _rows_and_pixels(spec: AutoencoderSpec, lengths: Mapping[str, int]) -> tuple[int, int, int]:
    """Return batch, height and width in pixels."""
    if "image_height" in lengths:
        return lengths["batch"], lengths["image_height"], lengths["image_width"]
    return lengths["batch"], lengths["height"] * spec.factor, lengths["width"] * spec.factor


def _unet_values(spec: UNetSpec, height: int, width: int) -> Iterator[int]:
    yield spec.model_channels * spec.channel_mult[0] * height * width
    for level, (mult, depth) in enumerate(
        zip(spec.channel_mult, spec.transformer_depth, strict=True)
    ):
        if depth:
            channels = mult * spec.model_channels
            heads = spec.num_heads or channels // (spec.num_head_channels or channels)
            yield heads * ((height >> level) * (width >> level)) ** 2


def _autoencoder_values(spec: AutoencoderSpec, height: int, width: int) -> Iterator[int]:
    yield spec.channels * spec.channel_mult[0] * height * width
    middle = [len(spec.channel_mult) - 1] if spec.middle_attention else []
    for level in (*spec.attention_levels, *middle):
        yield ((height >> level) * (width >> level)) ** 2
