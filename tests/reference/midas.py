"""A small depth estimator in the names of MiDaS, and transformers' DPT-Hybrid over its weights.

The renaming follows `convert_dpt_hybrid_to_pytorch.py` of transformers 4.57, which made the weights
that diffusers loads; it is written apart from ours, so that a misreading cannot cancel out.
"""

import re

import torch
from transformers import BitConfig, DPTConfig, DPTForDepthEstimation

from ldm_export.networks.depth_estimator import DepthEstimator
from ldm_runtime.specs.networks import DepthEstimatorSpec
from tests.export.small_checkpoint import randomise
from tests.export.small_spec import DEPTH_ESTIMATOR

PREFIX = "depth_model.model."
_HALVES = (
    ("backbone.levels.", "pretrained.model.patch_embed.backbone.stages."),
    ("backbone.", "pretrained.model.patch_embed.backbone."),
    ("model.", "pretrained.model."),
)
_TWINS = (
    (r"^pretrained\.model\.(cls_token)", r"dpt.embeddings.\1"),
    (r"^pretrained\.model\.pos_embed", "dpt.embeddings.position_embeddings"),
    (r"^pretrained\.model\.patch_embed\.proj\.", "dpt.embeddings.projection."),
    (
        r"^pretrained\.model\.patch_embed\.backbone\.stem\.conv\.",
        "dpt.embeddings.backbone.bit.embedder.convolution.",
    ),
    (
        r"^pretrained\.model\.patch_embed\.backbone\.stem\.norm\.",
        "dpt.embeddings.backbone.bit.embedder.norm.",
    ),
    (
        r"^pretrained\.model\.patch_embed\.backbone\.stages\.(\d)\.blocks\.",
        r"dpt.embeddings.backbone.bit.encoder.stages.\1.layers.",
    ),
    (r"^pretrained\.model\.norm\.", "dpt.layernorm."),
    (r"^pretrained\.model\.blocks\.", "dpt.encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^(dpt\.encoder\.layer\.\d+\.)norm1\.", r"\1layernorm_before."),
    (r"^(dpt\.encoder\.layer\.\d+\.)norm2\.", r"\1layernorm_after."),
    (r"^pretrained\.act_postprocess3\.0\.project\.", "neck.reassemble_stage.readout_projects.2."),
    (r"^pretrained\.act_postprocess4\.0\.project\.", "neck.reassemble_stage.readout_projects.3."),
    (r"^pretrained\.act_postprocess3\.3\.", "neck.reassemble_stage.layers.2.projection."),
    (r"^pretrained\.act_postprocess4\.3\.", "neck.reassemble_stage.layers.3.projection."),
    (r"^pretrained\.act_postprocess4\.4\.", "neck.reassemble_stage.layers.3.resize."),
    (r"^scratch\.layer1_rn\.", "neck.convs.0."),
    (r"^scratch\.layer2_rn\.", "neck.convs.1."),
    (r"^scratch\.layer3_rn\.", "neck.convs.2."),
    (r"^scratch\.layer4_rn\.", "neck.convs.3."),
    (r"^scratch\.refinenet4\.", "neck.fusion_stage.layers.0."),
    (r"^scratch\.refinenet3\.", "neck.fusion_stage.layers.1."),
    (r"^scratch\.refinenet2\.", "neck.fusion_stage.layers.2."),
    (r"^scratch\.refinenet1\.", "neck.fusion_stage.layers.3."),
    (r"\.out_conv\.", ".projection."),
    (r"\.resConfUnit(\d)\.conv(\d)\.", r".residual_layer\1.convolution\2."),
    (r"^scratch\.output_conv\.", "head.head."),
)


def midas_tensors(spec: DepthEstimatorSpec = DEPTH_ESTIMATOR) -> dict[str, torch.Tensor]:
    """Return random tensors under the names of a checkpoint, those that are unused as well."""
    network = DepthEstimator(spec)
    randomise(network)
    with torch.no_grad():
        network.model.pos_embed.normal_()
        network.scratch.output_conv[4].bias.fill_(2.0)  # above 0, where the last layer would cut
    unused = torch.nn.ModuleDict(
        {
            "norm": torch.nn.LayerNorm(spec.width),
            "head": torch.nn.Linear(spec.width, 10),
            "conv1": torch.nn.Conv2d(spec.fusion_channels, spec.fusion_channels, 3),
        }
    )
    places = {
        "norm": "pretrained.model.norm.",
        "head": "pretrained.model.head.",
        "conv1": "scratch.refinenet4.resConfUnit1.conv1.",
    }
    state = {_stored_name(name): value for name, value in network.state_dict().items()}
    for name, layer in unused.items():
        state |= {places[name] + part: value for part, value in layer.state_dict().items()}
    second = "scratch.refinenet4.resConfUnit1.conv2."
    state |= {second + name: value for name, value in unused["conv1"].state_dict().items()}
    return {PREFIX + name: value for name, value in state.items()}


def load_depth_estimator(
    state: dict[str, torch.Tensor], spec: DepthEstimatorSpec = DEPTH_ESTIMATOR
) -> DPTForDepthEstimation:
    """Return transformers' network over the tensors of a checkpoint."""
    backbone = BitConfig(
        global_padding="same",
        layer_type="bottleneck",
        depths=list(spec.level_blocks),
        hidden_sizes=list(spec.level_channels),
        embedding_size=spec.stem_channels,
        out_features=["stage1", "stage2", "stage3"],
        embedding_dynamic_padding=True,
    )
    config = DPTConfig(
        is_hybrid=True,
        backbone_config=backbone,
        hidden_size=spec.width,
        num_hidden_layers=12,
        num_attention_heads=spec.num_heads,
        intermediate_size=spec.feed_forward_dim,
        image_size=spec.side,
        patch_size=16,
        backbone_out_indices=[2, 5, 8, 11],
        backbone_featmap_shape=[1, spec.level_channels[2], spec.grid, spec.grid],
        reassemble_factors=[1, 1, 1, 0.5],
        neck_hidden_sizes=[*spec.level_channels[:2], spec.width, spec.width],
        fusion_hidden_size=spec.fusion_channels,
    )
    twin = DPTForDepthEstimation(config)
    found = {
        name.removeprefix(PREFIX): value
        for name, value in state.items()
        if name.startswith(PREFIX) and not name.startswith(f"{PREFIX}pretrained.model.head")
    }
    twin.load_state_dict(dict(_twins(found)), strict=True)
    return twin.eval().requires_grad_(False)


def _stored_name(name: str) -> str:
    for ours, theirs in (*_HALVES, ("act_", "pretrained.act_")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _twins(state):
    for name, value in state.items():
        twin = name
        for theirs, ours in _TWINS:
            twin = re.sub(theirs, ours, twin)
        if ".attn.qkv." in twin:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                yield twin.replace("attn.qkv", f"attention.attention.{part}"), rows
        else:
            yield twin, value
