"""Networks of an exported bundle in a model repository of Triton."""

import pytest

from ldm_runtime.cli.commands import main
from tests.runtime.triton_configs import graph_signature


@pytest.mark.parametrize(("kind", "variant"), [("gpu", "fp16"), ("cpu", "fp32")])
def test_sizes_and_types_are_those_of_the_graphs(kind, variant, small_bundle_fp16, tmp_path):
    flags = ("--out", str(tmp_path), "--networks", "--kind", kind, "--name", "small")

    assert main(["triton", str(small_bundle_fp16), *flags]) == 0

    models = sorted(tmp_path.glob("small_*"))
    assert len(models) >= 4
    for model in models:
        for configured, found in graph_signature(model):
            assert configured == found
        graph = model / "1/model.onnx/model.onnx"
        component = small_bundle_fp16 / model.name.removeprefix("small_")
        (original,) = (each for each in component.glob("*.onnx") if each.samefile(graph))
        assert ("cpu" in original.name) == (variant == "fp32")
