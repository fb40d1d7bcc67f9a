"""Write a checkpoint in CompVis's layout as a folder of diffusers, with diffusers' own reader.

The text encoder's tensors keep the names that they have in the checkpoint and in every released
folder; current transformers would write them without their first part, which older programs need.
"""

import json
import sys
from pathlib import Path
from typing import Any

_TEXT_PREFIX = "cond_stage_model.transformer."
_BUFFER = "embeddings.position_ids"


def main() -> None:
    """Write the folder of the job."""
    job = json.loads(sys.argv[1])
    out = Path(job["out"])
    import torch
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        UNet2DConditionModel,
        __version__,
    )
    from safetensors.torch import save_file

    read = torch.load(job["checkpoint"], map_location="cpu", weights_only=True, mmap=True)
    state = read["state_dict"]
    for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        network = kind.from_single_file(
            dict(state),
            original_config=job["original_config"],
            torch_dtype=torch.float16,
            local_files_only=True,
        )
        network.save_pretrained(out / name)
    scheduler: Any = EulerDiscreteScheduler  # whose base classes are not typed
    scheduler(**job["scheduler"]).save_pretrained(out / "scheduler")
    (out / "text_encoder").mkdir()
    tensors = {
        name.removeprefix(_TEXT_PREFIX): value.contiguous()
        for name, value in state.items()
        if name.startswith(_TEXT_PREFIX) and not name.endswith(_BUFFER)
    }
    save_file(tensors, out / "text_encoder/model.safetensors", metadata={"format": "pt"})
    _write_json(
        out / "text_encoder/config.json",
        **job["text_encoder"],
        architectures=["CLIPTextModel"],
        model_type="clip_text_model",
        torch_dtype="float16",
    )
    _write_json(
        out / "tokenizer/tokenizer_config.json",
        tokenizer_class="CLIPTokenizer",
        model_max_length=job["text_encoder"]["max_position_embeddings"],
        bos_token="<|startoftext|>",
        **dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    )
    _write_json(
        out / "model_index.json",
        _class_name="StableDiffusionPipeline",
        _diffusers_version=__version__,
        unet=["diffusers", "UNet2DConditionModel"],
        vae=["diffusers", "AutoencoderKL"],
        scheduler=["diffusers", "EulerDiscreteScheduler"],
        text_encoder=["transformers", "CLIPTextModel"],
        tokenizer=["transformers", "CLIPTokenizer"],
        safety_checker=[None, None],
        feature_extractor=[None, None],
        requires_safety_checker=False,
    )


def _write_json(path: Path, **entries: Any) -> None:  # noqa: ANN401
    path.write_text(json.dumps(entries, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
