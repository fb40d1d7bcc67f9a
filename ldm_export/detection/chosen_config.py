"""The configuration of a checkpoint: the stated file, one next to it, or none."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ldm_export.detection.compvis_config import Config, read_config
from ldm_export.errors import ForeignConfigError

_LOGGER = logging.getLogger(__name__)

_USUAL = "config.yaml"

#: A configuration as the user states it: a file, "none", or None for one next to the checkpoint.
StatedConfig = Path | Literal["none"] | None


@dataclass(frozen=True, kw_only=True)
class ChosenConfig:
    """A configuration and its file."""

    path: Path
    config: Config


def chosen_config(checkpoint: Path, stated: StatedConfig = None) -> ChosenConfig | None:
    """Return the configuration of a checkpoint, or None without one.

    A file next to the checkpoint, or next to what a link leads to, is named after it, or
    `config.yaml`. One of another program (trainers leave a `config.yaml` too) is ignored with a
    warning; a stated one is an error. A folder of diffusers has configurations inside.

    Args:
        checkpoint: The checkpoint's path.
        stated: The user's choice.

    Raises:
        ExportError: The file cannot be read, or is not YAML.
        ForeignConfigError: The stated file is not a CompVis configuration.
    """
    if stated == "none":
        return None
    if stated is not None:
        return ChosenConfig(path=stated, config=read_config(stated))
    for path in () if checkpoint.is_dir() else _next_to(checkpoint):
        try:
            config = read_config(path)
        except ForeignConfigError as error:
            _LOGGER.warning("a file next to the checkpoint is ignored: %s", error)
            continue
        _LOGGER.info("reading %s, which lies next to the checkpoint", path)
        return ChosenConfig(path=path, config=config)
    return None


def _next_to(checkpoint: Path) -> list[Path]:
    """Return the files that may be a checkpoint's configuration, the likeliest first."""
    places = dict.fromkeys((checkpoint, checkpoint.resolve()))
    names = (path for each in places for path in (each.with_suffix(".yaml"), each.parent / _USUAL))
    return list(filter(Path.is_file, dict.fromkeys(names)))
