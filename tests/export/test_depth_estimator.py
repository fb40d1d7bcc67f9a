"""The depth estimator of Stable Diffusion 2: its sizes, its weights and its row of the table."""

from dataclasses import replace

import pytest
import torch

from ldm_export.detection.detect import detect
from ldm_export.errors import WeightsError
from ldm_export.families.records import DEPTH_ESTIMATOR_PREFIX
from ldm_export.graphs.onnx_export import write_graphs
from ldm_export.graphs.parity import measure
from ldm_export.hyperparameters.depth_estimator import read_depth_estimator
from ldm_export.networks.depth_estimator import DepthEstimator, StandardisedConv2d
from ldm_runtime.specs.networks import DepthEstimatorSpec
from released.released_models import MODELS
from tests.export.sd_layout import SD2, FakeTensor, checkpoint
from tests.export.small_spec import DEPTH_ESTIMATOR, SPEC
from tests.export.test_onnx_export import random_network, samples

_MODEL = MODELS["512-depth-ema"]
RELEASED = _MODEL.networks.of(DepthEstimatorSpec)
SMALL = replace(
    SPEC.with_networks(
        unet=replace(SPEC.unet, in_channels=5),
        depth_estimator=DEPTH_ESTIMATOR,
    ),
    task="depth-to-image",
)
#: Tensors of the released file that no depth depends on.
UNUSED = {
    name.removeprefix(DEPTH_ESTIMATOR_PREFIX): shape
    for name, shape in _MODEL.unused.items()
    if name.startswith(DEPTH_ESTIMATOR_PREFIX)
}


def released_shapes():
    with torch.device("meta"):
        network = DepthEstimator(RELEASED)
    return {name: tuple(each.shape) for name, each in network.named_parameters()}


def stored(name):
    """Return the name in the released file of a parameter."""
    for ours, theirs in (
        ("backbone.levels.", "pretrained.model.patch_embed.backbone.stages."),
        ("backbone.", "pretrained.model.patch_embed.backbone."),
        ("model.", "pretrained.model."),
        ("act_", "pretrained.act_"),
    ):
        if name.startswith(ours):
            return f"depth_model.model.{theirs}{name.removeprefix(ours)}"
    return f"depth_model.model.{name}"


def depth_checkpoint(**changes):
    """Return the tensors of the released file, some of them of other shapes."""
    shapes = {stored(name): shape for name, shape in released_shapes().items()}
    shapes |= {f"depth_model.model.{name}": shape for name, shape in UNUSED.items()}
    midas = {name: FakeTensor(shape=shape) for name, shape in (shapes | changes).items()}
    return checkpoint(replace(SD2, in_channels=5)) | midas


def test_the_released_depth_estimator_has_as_many_weights_as_its_file():
    shapes = [*released_shapes().values(), *UNUSED.values()]

    assert len(shapes) == 368
    assert sum(torch.Size(shape).numel() for shape in shapes) == pytest.approx(123.147e6, abs=500)


def test_its_hyperparameters_are_read_from_its_shapes():
    assert read_depth_estimator(released_shapes()) == RELEASED


def test_the_released_checkpoint_predicts_the_noise_at_512_pixels():
    detection = detect(depth_checkpoint())

    spec = detection.spec
    assert (spec.family, spec.task) == ("stable-diffusion-2-depth", "depth-to-image")
    assert (spec.prediction_type, spec.unet.concat_channels) == ("epsilon", 1)
    assert (spec.defaults.height, spec.defaults.guidance_scale) == (512, 9.0)
    assert spec.networks["depth_estimator"] == RELEASED
    assert {f"depth_model.model.{name}" for name in UNUSED} <= detection.unused.keys()


def test_a_checkpoint_without_a_depth_estimator_is_of_the_same_family():
    spec = detect(checkpoint(replace(SD2, in_channels=5))).spec

    assert (spec.family, spec.task) == ("stable-diffusion-2-depth", "depth-to-image")
    assert "depth_estimator" not in spec.networks


def test_position_embeddings_of_no_square_are_refused():
    embeddings = {"depth_model.model.pretrained.model.pos_embed": (1, 500, 768)}

    with pytest.raises(WeightsError, match=r"has 500 position embeddings \(model.pos_embed\)"):
        detect(depth_checkpoint(**embeddings))


def test_weights_are_standardised_when_they_are_loaded():
    layer = StandardisedConv2d(8, 4, 3)
    weight = 1e-3 * torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(0)) + 0.5

    layer.load_state_dict({"weight": weight}, assign=True)

    rows = weight.double().flatten(1)
    wanted = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, False, keepdim=True) + 1e-8) ** 0.5
    torch.testing.assert_close(layer.weight.double().flatten(1), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_its_graphs_compute_what_torch_computes(tmp_path):
    """`measure` refuses a difference above the bound of either graph."""
    name, network = "depth_estimator", random_network("depth_estimator", SMALL)
    graphs = write_graphs(name, network, SMALL, tmp_path, "float32")
    inputs = samples(name, network, SMALL, network)

    records = [record for graph in graphs for record in measure(name, graph, tmp_path, inputs)]

    assert {record.variant for record in records} == {"fp32", "fp16"}
    assert max(each.max_relative_error for each in records if each.variant == "fp32") < 1e-4
    assert all(sample.expected["depth"].std() > 0.01 for sample in inputs)
