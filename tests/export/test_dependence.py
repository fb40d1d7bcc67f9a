from types import SimpleNamespace

import pytest

from ldm_export.checkpoint.checkpoint import open_checkpoint
from ldm_export.graphs.onnx_export import sample_inputs
from ldm_export.graphs.torch_engine import TorchEngine
from ldm_export.networks.loading import load_network
from ldm_export.source import ExportOptions, open_source
from ldm_runtime.diagnostics.dependence import ignored_inputs, warn_of_ignored_inputs
from ldm_runtime.specs.model import components_of
from ldm_runtime.specs.networks import ClassEmbedderSpec
from tests.conftest import SHAPES_CHECKPOINT
from tests.export.small_checkpoint import UNET, random_networks
from tests.export.small_spec import SPEC

TRAINED = ("class_to_image", "layout_to_image", "semantic_synthesis", "shapes", "super_resolution")
SMALL = SPEC.with_networks(unet=UNET)


def ignored_by(name, network, spec):
    inputs = sample_inputs(name, spec)[0][1]
    engine = TorchEngine(name, network)
    return ignored_inputs(name, engine, inputs, engine.run(inputs), spec)


@pytest.mark.parametrize("model", TRAINED)
def test_no_network_of_a_trained_model_ignores_an_input(model):
    path = SHAPES_CHECKPOINT.with_name(f"{model}.ckpt")
    with open_checkpoint(path) as checkpoint:
        source = open_source(ExportOptions(checkpoint=path, out=path), checkpoint, hashed=False)
        found = {
            name: ignored_by(
                name, load_network(name, source.spec, source.weights(name)), source.spec
            )
            for name in components_of(source.spec)
        }

    assert found == dict.fromkeys(components_of(source.spec), ())


def unet_without(*places):
    """Return a random UNet whose parameters of these names are zero."""
    unet = random_networks().unet
    for name, parameter in unet.named_parameters():
        if any(place in name for place in places):
            parameter.zero_()
    return unet


@pytest.mark.parametrize(
    ("zeros", "ignored"),
    [
        ((), ()),
        (("out.2.",), ("latents", "timesteps", "context")),
        (("input_blocks.0.0.weight",), ("latents",)),
        (("emb_layers",), ("timesteps",)),
        (("attn2.to_out",), ("context",)),
    ],
)
def test_what_zeros_cut_off_is_ignored(zeros, ignored):
    assert ignored_by("unet", unet_without(*zeros), SMALL) == ignored


def test_an_ignored_input_is_one_warning_that_names_the_network(caplog):
    inputs = sample_inputs("unet", SMALL)[0][1]
    engine = TorchEngine("unet", unet_without("emb_layers", "attn2.to_out"))

    warn_of_ignored_inputs("unet", engine, inputs, engine.run(inputs), SMALL)

    (record,) = caplog.records
    assert "the output of the unet does not depend on its timesteps and context," in record.message


def test_an_input_of_one_value_only_is_not_called_ignored():
    embedder = SimpleNamespace(run=lambda inputs: {"context": inputs["class_labels"]})
    one_class = SPEC.with_networks(
        class_embedder=ClassEmbedderSpec(num_classes=1, width=1, null_class=None)
    )
    inputs = {"class_labels": 0 * sample_inputs("text_encoder", SPEC)[0][1]["tokens"][:, 0]}

    assert ignored_inputs("class_embedder", embedder, inputs, embedder.run(inputs), one_class) == ()
