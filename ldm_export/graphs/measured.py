"""The graphs of a component after they were measured: an fp16 graph is kept only if it holds."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ldm_export.errors import PrecisionError
from ldm_export.graphs.parity import Sample, measure
from ldm_export.graphs.precision import FP32_ISLANDS, WHOLE_NETWORK
from ldm_runtime.bundle.manifest import GraphRecord, ParityRecord

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MeasuredGraphs:
    """The graphs of a component.

    Attributes:
        graphs: The graphs; that of "fp16" may be the file of "fp32".
        parity: Their errors against torch.
        fp32_islands: The parts of the fp16 graph that compute in fp32; empty without one.
    """

    graphs: tuple[GraphRecord, ...]
    parity: tuple[ParityRecord, ...]
    fp32_islands: tuple[str, ...]


def measured_graphs(
    name: str, graphs: Sequence[GraphRecord], folder: Path, samples: Sequence[Sample]
) -> MeasuredGraphs:
    """Measure the graphs of a component against torch.

    Where half precision cannot hold the network, its fp16 graph is deleted with a warning, and GPU
    builders get the fp32 graph instead: no model is refused for a precision.

    Args:
        name: The component.
        graphs: The fp32 graph, and the fp16 graph if there should be one.
        folder: Folder of their files.
        samples: Inputs, and torch's outputs for them.

    Raises:
        ExportError: A graph does not load or run, or the fp32 graph differs from torch.
    """
    fp32, *others = graphs
    parity = measure(name, fp32, folder, samples)
    alone = MeasuredGraphs(graphs=(fp32,), parity=parity, fp32_islands=())
    if not others:
        return alone
    (fp16,) = others
    try:
        parity += measure(name, fp16, folder, samples)
    except PrecisionError as error:
        _LOGGER.warning(
            "%s; the whole %s stays in fp32 on GPUs too, which is slower there (--no-fp16 leaves "
            "such graphs out of a bundle for CPUs)",
            error,
            name,
        )
        (folder / Path(fp16.file).name).unlink()
        return whole_in_fp32(alone)
    return MeasuredGraphs(graphs=(fp32, fp16), parity=parity, fp32_islands=FP32_ISLANDS)


def whole_in_fp32(measured: MeasuredGraphs) -> MeasuredGraphs:
    """Return the graphs of a component of which only the fp32 graph is there, for GPUs as well."""
    (fp32,) = measured.graphs
    own = (record for record in measured.parity if record.reference == "checkpoint")
    return MeasuredGraphs(
        graphs=(fp32, replace(fp32, variant="fp16")),
        parity=(*measured.parity, *(replace(record, variant="fp16") for record in own)),
        fp32_islands=(WHOLE_NETWORK,),
    )
