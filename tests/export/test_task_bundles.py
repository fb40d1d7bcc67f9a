"""A bundle of every task: exported from a checkpoint, verified without torch, some with engines.

The models are as small as their kinds allow, and share hyperparameters, so that few networks have
to be traced.
"""

import importlib.util
from dataclasses import replace

import pytest

from ldm_export.bundle import estimate_export, export_bundle
from ldm_export.detection.overrides import Overrides
from ldm_export.source import ExportOptions
from ldm_runtime.bundle.manifest import load_manifest
from ldm_runtime.diagnostics.verify import verify
from ldm_runtime.engines.build_specs import EngineOptions
from ldm_runtime.engines.profiles import SizeRange
from ldm_runtime.engines.records import load_engine_records
from ldm_runtime.specs.model import components_of
from ldm_runtime.specs.networks import (
    ClassEmbedderSpec,
    Networks,
    SegmentationEncoderSpec,
)
from ldm_runtime.testing import autoencoder_spec, text_encoder_spec, unet_spec
from released import random_checkpoints
from released.records import ReleasedModel

SIZE = 32
#: Whatever the kind of model, one head of all 32 channels.
FEATURES = Overrides(height=SIZE, width=SIZE, num_head_channels=32)
AUTOENCODER = autoencoder_spec(
    kind="vq",
    channels=32,
    channel_mult=(1, 1),
    num_res_blocks=1,
    middle_attention=False,
    z_channels=3,
    embed_dim=3,
    codebook_size=64,
    latent_scale_factor=1.0,
)
QKV = unet_spec(
    in_channels=3,
    out_channels=3,
    model_channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention="qkv",
    transformer_depth=(1,),
    num_heads=None,
    num_head_channels=32,
    context_dim=None,
)
CROSS = replace(QKV, attention="transformer", context_dim=64)
WORDS = text_encoder_spec(
    kind="bert",
    width=64,
    num_layers=1,
    num_heads=1,
    feed_forward_dim=64,
    vocab_size=30522,
    activation="gelu",
    pad_token_id=0,
)


def model(task, unet, **conditioner):
    return ReleasedModel(
        name=task,
        task=task,
        parameters_millions=(0.0, 0.0, 0.0),
        networks=Networks(autoencoder=AUTOENCODER, unet=unet, **conditioner),
    )


MODELS = (
    model("unconditional", QKV),
    model(
        "class-to-image",
        CROSS,
        class_embedder=ClassEmbedderSpec(num_classes=1001, width=64, null_class=1000),
    ),
    model("text-to-image", CROSS, text_encoder=WORDS),
    model(
        "layout-to-image",
        CROSS,
        text_encoder=replace(WORDS, vocab_size=400, max_tokens=20, pad_token_id=399),
    ),
    model(
        "semantic-synthesis",
        replace(QKV, in_channels=6),
        segmentation_encoder=SegmentationEncoderSpec(
            num_classes=5, out_channels=3, num_downsampling_steps=1
        ),
    ),
    model("super-resolution", replace(QKV, in_channels=6)),
    model("inpainting", replace(QKV, in_channels=7)),
    model("retrieval", CROSS),
    model("autoencoder", None),
)
#: Every other one stores fp32: what weights are stored as has nothing to do with the task.
CASES = [
    pytest.param(each, dtype, id=f"{each.task}-{dtype}")
    for each, dtype in zip(MODELS, ("float16", "float32") * len(MODELS), strict=False)
]


#: Those whose bundles get engines too, because they have networks that no other has.
BUILT = ("class-to-image", "text-to-image", "semantic-synthesis")
HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
RTX = EngineOptions(builder="tensorrt_rtx", sizes=SizeRange(static=True), targets=("sm86",))
NONE = EngineOptions(builder="none")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "dtype"), CASES)
@pytest.mark.usefixtures("kept_traces")
def test_every_task_becomes_a_bundle_that_keeps_its_promises(model, dtype, tmp_path):
    checkpoint, bundle = tmp_path / "random.ckpt", tmp_path / "engines"
    random_checkpoints.write_checkpoint(checkpoint, model)
    if model.task == "retrieval":  # of so few channels it is known by its configuration
        checkpoint.with_suffix(".yaml").write_text(
            "model: {params: {cond_stage_config: {target: torch.nn.Identity}}}"
        )
    options = ExportOptions(
        checkpoint=checkpoint,
        out=bundle,
        overrides=FEATURES
        if "unet" in model.networks
        else replace(FEATURES, num_head_channels=None),
        weights_dtype=dtype,
        engines=RTX if HAS_RTX and model.task in BUILT else NONE,
    )
    plan = estimate_export(options)

    manifest = export_bundle(options)

    assert load_manifest(bundle) == manifest
    assert (manifest.spec.task, manifest.weights_dtype) == (model.task, dtype)
    assert manifest.spec.networks == model.networks
    assert manifest.spec.autoencoder == AUTOENCODER
    assert [each.name for each in manifest.components] == list(components_of(manifest.spec))
    assert (manifest.tokenizer_file is not None) == (model.task == "text-to-image")
    assert manifest.preview is not None
    assert len(manifest.golden) == (2 if model.task == "autoencoder" else 3)
    assert f"task              {model.task}" in plan.describe()
    assert plan.parameters.keys() == components_of(manifest.spec).keys()
    engines = {record.component for record in load_engine_records(bundle, manifest)}
    assert engines == (components_of(manifest.spec).keys() if options.engines == RTX else set())
    checks = list(verify(bundle, backend="onnxruntime"))
    assert {check.measure for check in checks} == {"max_relative_error", "relative_l2", "psnr"}
    assert [check for check in checks if not check.passed] == []
