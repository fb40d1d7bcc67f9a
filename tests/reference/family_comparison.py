"""The images of a checkpoint family compared with another implementation's, and measured as rows.

The networks run in torch, and with `--graphs` also as the graphs that an export writes, in fp32 and
in fp16. With `--families FILE` a row of what was measured is appended, from which docs/families.md
is made.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ldm_export.graphs.onnx_export import write_graphs
from ldm_runtime.backends.onnxruntime.cpu import OnnxRuntimeEngine
from ldm_runtime.bundle.manifest import ComponentRecord
from ldm_runtime.specs.model import axis_sizes, components_of
from measuring.rows import append_line, commit
from tests.export.traces import Traces
from tests.reference.small_pipelines import generate, lowest_psnr

#: Lowest PSNR in dB, by what computes the networks.
BOUNDS = {"torch": 60.0, "fp32": 60.0, "fp16": 35.0}
#: The same of fp16 with a codebook, where near ties of random weights take other codes.
CODEBOOK_BOUND = 30.0
#: Of equal images, whose PSNR has no end.
HIGHEST = 120.0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Compares images, and appends a row of what it measured if it has a file for it.

    Attributes:
        results: The file, or None to append nothing.
        through_graphs: Whether graphs are compared, too.
        test: Name of the test that compares.
        folder: Empty folder for graphs.
        traces: The traces that are kept between tests.
    """

    results: Path | None
    through_graphs: bool
    test: str
    folder: Path
    traces: Traces

    def __call__(self, family: str, ours: Any, expected: Any, **fields: Any) -> Any:
        """Return our images of a request (N, H, W, 3), which must be as good as the expected ones.

        Args:
            family: The name that the checkpoint must be recognised by.
            ours: The detected checkpoint, see `small_families.open_networks`.
            expected: Images (N, H, W, 3) of whole numbers, 0 to 255.
            fields: Of the request.
        """
        assert ours.spec.family == family
        images = generate(ours, **fields)
        psnr = {"torch": lowest_psnr(images, expected)}
        if self.through_graphs:
            for precision, graphs in self._as_graphs(ours).items():
                psnr[precision] = lowest_psnr(generate(graphs, **fields), expected)
        if self.results is not None:
            self._record(family, ours.spec.task, psnr)
        has_codebook = ours.spec.autoencoder.kind == "vq"
        bounds = BOUNDS | ({"fp16": CODEBOOK_BOUND} if has_codebook else {})
        assert {name: value for name, value in psnr.items() if value < bounds[name]} == {}
        return images

    def _as_graphs(self, ours: Any) -> dict[str, SimpleNamespace]:
        """Return the checkpoint with its fp32 graphs for networks, and with its fp16 graphs.

        Weights are stored once, in float32; the fp16 graphs round them where they are used.
        """
        engines: dict[str, dict[str, OnnxRuntimeEngine]] = {"fp32": {}, "fp16": {}}
        for name, row in components_of(ours.spec).items():
            place = self.folder / name
            place.mkdir()
            with self.traces.kept():
                network = ours.network(name).network
                graphs = write_graphs(name, network, ours.spec, place, "float32")
            record = ComponentRecord(
                name=name,
                inputs=row.inputs,
                outputs=row.outputs,
                graphs=graphs,
                weights_file="",
                fp32_islands=(),
                parity=(),
                key="",
            )
            sizes = axis_sizes(ours.spec, name)
            for graph in graphs:
                path = place / Path(graph.file).name
                engine = OnnxRuntimeEngine(path, record, sizes, threads=1)
                engines[graph.variant][name] = engine
        return {
            precision: SimpleNamespace(spec=ours.spec, network=known.__getitem__, words=ours.words)
            for precision, known in engines.items()
        }

    def _record(self, family: str, task: str, psnr: dict[str, float]) -> None:
        row = {
            "family": family,
            "task": task,
            "psnr": {name: min(value, HIGHEST) for name, value in psnr.items()},
            "test": self.test,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
        }
        append_line(self.results, row)
