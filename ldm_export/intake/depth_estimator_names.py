"""Names of a depth estimator's tensors in transformers, and in checkpoints of Stable Diffusion 2.

Source: `DPTForDepthEstimation` of transformers 5 and its `convert_dpt_hybrid_to_pytorch.py`.
"""

import re
from collections.abc import Iterable

from ldm_export.families.records import DEPTH_ESTIMATOR_PREFIX

_BACKBONE = "pretrained.model.patch_embed.backbone."
_SPELLINGS = tuple(
    (re.compile(theirs), ours)
    for theirs, ours in (
        (r"dpt\.embeddings\.backbone\.bit\.embedder\.convolution\.", f"{_BACKBONE}stem.conv."),
        (r"dpt\.embeddings\.backbone\.bit\.embedder\.norm\.", f"{_BACKBONE}stem.norm."),
        (
            r"dpt\.embeddings\.backbone\.bit\.encoder\.stages\.(\d+)\.layers\.",  # codespell:ignore
            rf"{_BACKBONE}stages.\1.blocks.",  # codespell:ignore
        ),
        (r"dpt\.embeddings\.cls_token", "pretrained.model.cls_token"),
        (r"dpt\.embeddings\.position_embeddings", "pretrained.model.pos_embed"),
        (r"dpt\.embeddings\.projection\.", "pretrained.model.patch_embed.proj."),
        (r"dpt\.layernorm\.", "pretrained.model.norm."),
        *(
            (rf"dpt\.encoder\.layer\.(\d+)\.{theirs}\.", rf"pretrained.model.blocks.\1.{ours}.")
            for theirs, ours in (
                (r"attention\.output\.dense", "attn.proj"),
                (r"intermediate\.dense", "mlp.fc1"),
                (r"output\.dense", "mlp.fc2"),
                ("layernorm_before", "norm1"),
                ("layernorm_after", "norm2"),
            )
        ),
        *(
            item
            for place in (3, 4)
            for item in (
                (
                    rf"neck\.reassemble_stage\.readout_projects\.{place - 1}\.",
                    f"pretrained.act_postprocess{place}.0.project.",
                ),
                (
                    rf"neck\.reassemble_stage\.layers\.{place - 1}\.projection\.",
                    f"pretrained.act_postprocess{place}.3.",
                ),
            )
        ),
        (r"neck\.reassemble_stage\.layers\.3\.resize\.", "pretrained.act_postprocess4.4."),
        *(
            item
            for level in (1, 2, 3, 4)
            for item in (
                (rf"neck\.convs\.{level - 1}\.", f"scratch.layer{level}_rn."),
                (
                    rf"neck\.fusion_stage\.layers\.{4 - level}\.projection\.",
                    f"scratch.refinenet{level}.out_conv.",
                ),
                (
                    rf"neck\.fusion_stage\.layers\.{4 - level}\."
                    r"residual_layer([12])\.convolution([12])\.",
                    rf"scratch.refinenet{level}.resConfUnit\1.conv\2.",
                ),
            )
        ),
        (r"head\.head\.([024])\.", r"scratch.output_conv.\1."),
    )
)
_PROJECTION = re.compile(
    r"dpt\.encoder\.layer\.(\d+)\.attention\.attention\.(?:query|key|value)\.(weight|bias)"
)


def depth_estimator_names(names: Iterable[str]) -> dict[str, str | None]:
    """Return the name in a single file of every tensor, None of unknown ones.

    Those of queries, keys and values are left out: see `projections`.
    """
    return {name: _single_file_name(name) for name in names if not _PROJECTION.fullmatch(name)}


def projections(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of the queries, keys and values that are one tensor of a single file."""
    found: dict[str, list[str]] = {}
    for name in names:
        if match := _PROJECTION.fullmatch(name):
            layer, kind = match.groups()
            joined = f"{DEPTH_ESTIMATOR_PREFIX}pretrained.model.blocks.{layer}.attn.qkv.{kind}"
            place = f"dpt.encoder.layer.{layer}.attention.attention"
            found[joined] = [f"{place}.{part}.{kind}" for part in ("query", "key", "value")]
    return found


def _single_file_name(name: str) -> str | None:
    for pattern, replacement in _SPELLINGS:
        if match := pattern.match(name):
            return DEPTH_ESTIMATOR_PREFIX + match.expand(replacement) + name[match.end() :]
    return None
