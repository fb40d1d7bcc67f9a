"""Turns a latent-diffusion checkpoint into a bundle that `ldm_runtime` runs without torch."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm_export.detection.overrides import Overrides
    from ldm_runtime.bundle.manifest import Manifest, WeightsDType
    from ldm_runtime.engines.build_specs import EngineOptions
    from ldm_runtime.progress import Progress

__all__ = ["export"]


def export(  # noqa: PLR0913  (the command's flags, less the overrides)
    ckpt: str | Path,
    out: str | Path,
    *,
    config: str | Path | None = None,
    overrides: "Overrides | None" = None,
    weights_dtype: "WeightsDType" = "float16",
    engines: "EngineOptions | None" = None,
    replace: bool = False,
    fp16: bool = True,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    text_encoder_2: str | Path | None = None,
    tiny_decoder: str | Path | None = None,
    image_normalizer: str | Path | None = None,
    progress: "Progress | None" = None,
) -> "Manifest":
    """Export a checkpoint to a bundle: the same as `ldm-export --ckpt … --out … --engines none`.

    Args:
        ckpt: A `.ckpt`, `.pt`, `.pth` or `.safetensors` file, which is never unpickled, or a
            folder of diffusers.
        out: Folder of the bundle. An existing bundle of the same checkpoint is replaced in one
            step; anything else there is an error.
        config: CompVis configuration for what weights cannot tell; by default `<ckpt>.yaml` or
            `config.yaml` next to the checkpoint, if there is one; "none" ignores what lies there.
        overrides: Features that the weights cannot tell, stated by hand.
        weights_dtype: How weights are stored: "float16" or "float32".
        engines: Which TensorRT engines to build; None builds none.
        replace: Whether a bundle of another checkpoint at `out` may be replaced.
        fp16: Whether to write the fp16 graphs, which GPUs need and CPUs do not.
        vae: File or folder of an autoencoder that takes the place of the checkpoint's.
        text_encoder: File or folder of a CLIP text encoder that does likewise.
        text_encoder_2: File or folder of the second text encoder of SDXL, likewise.
        tiny_decoder: File or folder of a TAESD that the bundle can decode with as well.
        image_normalizer: File or folder of diffusers with mean and standard deviation of embeddings
            of images, which files of Stable Diffusion 2.1 unCLIP L lack.
        progress: Told when steps begin and end.

    Raises:
        LdmError: The checkpoint cannot be read, is unknown or does not fit, or the bundle cannot
            be written; see `ldm_export.errors`.
        OSError: The operating system refused to read or write: the disk is full, say.
    """
    from ldm_export.bundle import export_bundle
    from ldm_export.detection.overrides import Overrides
    from ldm_export.source import ExportOptions
    from ldm_runtime.engines.build_specs import EngineOptions

    options = ExportOptions(
        checkpoint=Path(ckpt),
        out=Path(out),
        config="none" if config == "none" else None if config is None else Path(config),
        overrides=overrides or Overrides(),
        weights_dtype=weights_dtype,
        engines=engines or EngineOptions(builder="none"),
        replace=replace,
        fp16=fp16,
        vae=None if vae is None else Path(vae),
        text_encoder=None if text_encoder is None else Path(text_encoder),
        text_encoder_2=None if text_encoder_2 is None else Path(text_encoder_2),
        tiny_decoder=None if tiny_decoder is None else Path(tiny_decoder),
        image_normalizer=None if image_normalizer is None else Path(image_normalizer),
    )
    return export_bundle(options, progress=progress)
