"""The names of a model's labels, from the user or the configuration."""

from ldm_export.detection.overrides import Sources
from ldm_export.detection.own_sections import checked_names
from ldm_export.errors import ExportError
from ldm_runtime.inputs.layouts import num_labels
from ldm_runtime.specs.networks import (
    ClassEmbedderSpec,
    Networks,
    SegmentationEncoderSpec,
    TextEncoderSpec,
)


def label_names_of(sources: Sources, networks: Networks) -> tuple[str, ...]:
    """Return the names of labels 0, 1, …, or none if no source has them.

    Raises:
        ExportError: They are not names, or there are more of them than labels.
    """
    flag, config = sources.flags.label_names, sources.config.label_names
    if flag is not None:
        flag = checked_names(flag, "--label-names")
    names, place = (config, "config: label_names") if flag is None else (flag, "--label-names")
    if names is None:
        return ()
    most = _num_labels(networks)
    if len(names) > most:
        raise ExportError(
            f"{place} has {len(names)} names, but this model has {most} labels; is it the list of "
            "another model?"
        )
    return names


def _num_labels(networks: Networks) -> int:
    """Return how many labels requests can name: none unless they hold classes."""
    if (embedder := networks.find(ClassEmbedderSpec)) is not None:
        return embedder.num_classes
    if (encoder := networks.find(SegmentationEncoderSpec)) is not None:
        return encoder.num_classes
    text = networks.find(TextEncoderSpec)
    return num_labels(text) if text is not None and text.kind == "bert" else 0
