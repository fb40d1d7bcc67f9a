"""A diffusers folder as one checkpoint: its tensors under the names that a single file has.

Source: `DiffusionPipeline.save_pretrained` of diffusers 0.42.1. Nothing behind this module knows of
diffusers: names and what the configurations state are translated here.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ldm_export.checkpoint.checkpoint import Checkpoint
from ldm_export.checkpoint.file_fields import FileFields
from ldm_export.checkpoint.stored_tensors import StoredTensor, joined
from ldm_export.errors import CheckpointError, UnknownModelError
from ldm_export.hyperparameters.shapes import listed
from ldm_export.intake.autoencoder_names import autoencoder_names
from ldm_export.intake.component import StoredComponent, open_component
from ldm_export.intake.depth_estimator_names import depth_estimator_names, projections
from ldm_export.intake.image_encoders import image_encoder_of, image_normalizer_of
from ldm_export.intake.json_files import Entries, read_json
from ldm_export.intake.renaming import renamed
from ldm_export.intake.statements import (
    autoencoder_fields,
    check_depth_estimator,
    check_small_image_noise,
    downsampling_factor,
    feature_extractor_fields,
    pipeline_fields,
    scheduler_fields,
    text_encoder_fields,
    unet_fields,
)
from ldm_export.intake.text_encoders import Kind, kind_of, placed, text_tensors
from ldm_export.intake.tokenizers import check_tokenizer
from ldm_export.intake.unet_names import unet_names

INDEX = "model_index.json"
_SCHEDULER = "scheduler/scheduler_config.json"
_NOISING_SCHEDULER = "image_noising_scheduler/scheduler_config.json"
_SMALL_IMAGE_SCHEDULER = "low_res_scheduler/scheduler_config.json"
_FEATURE_EXTRACTOR = "feature_extractor/preprocessor_config.json"
_CLIP = ("CLIPTextModel", "CLIPTextModelWithProjection")
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
#: Components that are exported, or decide what is, and the classes that they may be of.
_READ: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": _CLIP,
        "text_encoder_2": _CLIP,
        "tokenizer": _TOKENIZERS,
        "tokenizer_2": _TOKENIZERS,
        "depth_estimator": ("DPTForDepthEstimation",),
        "image_normalizer": ("StableUnCLIPImageNormalizer",),
        "low_res_scheduler": ("DDPMScheduler",),
    }
)
#: Likewise, in a pipeline that has an image normalizer; in others images do not depend on it.
_OF_UNCLIP: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "image_encoder": ("CLIPVisionModelWithProjection",),
        "feature_extractor": (
            *("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"),
            "CLIPFeatureExtractor",
        ),
        "image_noising_scheduler": ("DDPMScheduler",),
    }
)
#: What to do about a component of another class, where another takes its place and all is well.
_INSTEAD: Mapping[str, str] = MappingProxyType(
    {"vae": " (give an AutoencoderKL by --vae, and a tiny one by --tiny-decoder)"}
)
#: Components next to the model, which images do not depend on.
_IGNORED = frozenset({"scheduler", "safety_checker", "feature_extractor", "image_encoder"})
#: Places of text encoders in single files: of the only one, and of the first and the second of two.
ONLY_ENCODER = "cond_stage_model."
FIRST_ENCODER, SECOND_ENCODER = "conditioner.embedders.0.", "conditioner.embedders.1."


@dataclass
class _Intake:
    """What was read of a folder so far."""

    folder: Path
    stack: ExitStack
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    stated: dict[str, Any] = field(default_factory=dict)
    opened: list[Checkpoint] = field(default_factory=list)

    def component(self, name: str) -> StoredComponent:
        """Open a component of the folder."""
        if not (self.folder / name).is_dir():
            raise CheckpointError(
                self.folder, f"has no folder {name}, which its {INDEX} names; get it again"
            )
        component = open_component(self.folder / name)
        for each in component.opened:
            self.stack.enter_context(each)
        self.opened += component.opened
        self.files |= {f"{name}/{file}": path for file, path in component.files.items()}
        return component


def is_diffusers_folder(path: Path) -> bool:
    """Return whether a path is a folder with a pipeline of diffusers."""
    return (path / INDEX).is_file()


def open_folder(folder: Path, *, without: frozenset[str] = frozenset()) -> Checkpoint:
    """Open a diffusers folder.

    Args:
        folder: The one with `model_index.json`.
        without: Components that are not read because others take their place.

    Raises:
        CheckpointError: A file is missing, damaged, or says what is not exported.
        UnknownModelError: The pipeline is not Stable Diffusion.
    """
    index = read_json(folder / INDEX)
    names = _components(folder, index, without)
    with ExitStack() as stack:
        intake = _Intake(folder=folder, stack=stack, files={INDEX: folder / INDEX})
        if "vae" in names - without:
            intake.tensors |= autoencoder_of(intake.component("vae"))[0]
        _read_unet(intake, _read_autoencoder_config(intake) if "vae" in names else None)
        _read_text_encoders(intake, names, without)
        if "depth_estimator" in names:
            intake.tensors |= _depth_estimator_of(intake.component("depth_estimator"))
        if "image_normalizer" in names:
            _read_image_encoder(intake)
        if "low_res_scheduler" in names:
            noise = _scheduler_fields(intake, _SMALL_IMAGE_SCHEDULER)
            check_small_image_noise(folder / _SMALL_IMAGE_SCHEDULER, noise)
        intake.stated |= _scheduler_fields(intake, _SCHEDULER)
        intake.stated |= pipeline_fields(folder / INDEX, index)
        stack.pop_all()
    unusual = (name for each in intake.opened for name in each.unusual_globals)
    return Checkpoint(
        path=folder,
        format="diffusers",
        tensors=MappingProxyType(intake.tensors),
        skipped=(),
        global_step=None,
        metadata=MappingProxyType({}),
        unusual_globals=tuple(dict.fromkeys(unusual)),
        files=MappingProxyType(intake.files),
        stated=FileFields(**intake.stated),
        opened=tuple(intake.opened),
    )


def _components(folder: Path, index: Entries, without: frozenset[str]) -> frozenset[str]:
    """Return the components of a pipeline that are exported, or would be but for others."""
    pipeline = f"{index.get('_class_name')!a}"[:60]
    # Every other entry is a setting of the pipeline.
    classes = {
        name: value[1]
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value[1] is not None
    }
    of_unclip = _OF_UNCLIP if "image_normalizer" in classes else {}
    read, ignored = {**_READ, **of_unclip}, (_IGNORED | without) - of_unclip.keys()
    faults = [
        f"its {name} is {classes[name]!a:.60}{_INSTEAD.get(name, '')}"
        for name in classes
        if name not in ignored and classes[name] not in read.get(name, ())
    ]
    faults += [f"it has no {name}" for name in of_unclip if name not in classes]
    if "unet" not in classes:
        faults.insert(0, "it has no unet")
    if faults:
        raise UnknownModelError(
            f"{folder} is the pipeline {pipeline}, which is not exported: {', '.join(faults)}; "
            "pipelines of Stable Diffusion are, with a UNet2DConditionModel, an AutoencoderKL, "
            "CLIP text encoders and perhaps a DPT-Hybrid"
        )
    return frozenset(name for name in classes if classes[name] in read.get(name, ()))


def _read_autoencoder_config(intake: _Intake) -> int | None:
    """Read what is stated of the autoencoder, and return its downsampling factor if it is.

    It holds of an autoencoder in its place as well: the UNet's latents are the same.
    """
    path = intake.folder / "vae/config.json"
    if not path.is_file():
        return None
    entries = read_json(path)
    intake.files["vae/config.json"] = path
    intake.stated |= autoencoder_fields(path, entries)
    return downsampling_factor(path, entries)


def autoencoder_of(component: StoredComponent) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Return an autoencoder under its names in a single file, and what its configuration states.

    Raises:
        CheckpointError: It has tensors that are not known, or two for one, or is not one that is
            exported.
    """
    names = autoencoder_names(component.tensors)
    tensors = renamed(component, "autoencoder", names)
    if component.config is None:
        return tensors, {}
    return tensors, autoencoder_fields(component.path / "config.json", component.config)


def _read_unet(intake: _Intake, factor: int | None) -> None:
    component = intake.component("unet")
    intake.tensors |= unet_of(component)
    if component.config is not None:
        intake.stated |= unet_fields(component.path / "config.json", component.config, factor)


def unet_of(component: StoredComponent) -> dict[str, StoredTensor]:
    """Return a UNet under its names in a single file.

    Raises:
        CheckpointError: It has tensors that are not known.
    """
    return renamed(component, "UNet", unet_names(component.tensors))


def _read_text_encoders(intake: _Intake, names: frozenset[str], without: frozenset[str]) -> None:
    """Read the text encoders, the first, of one or of two, and the second; check tokenizers."""
    both = {"text_encoder", "text_encoder_2"} <= names
    if "text_encoder" in names - without:
        place = FIRST_ENCODER if both else ONLY_ENCODER
        tensors, fields = text_encoder_of(intake.component("text_encoder"), place)
        intake.tensors |= tensors
        intake.stated |= fields
        # The layers of OpenCLIP alone are trimmed.
        check_tokenizer(intake.folder / "tokenizer", openclip=fields["text_layers_trimmed"])
    if "text_encoder_2" in names - without:
        place = SECOND_ENCODER if both else FIRST_ENCODER
        component = intake.component("text_encoder_2")
        intake.tensors |= text_encoder_of(component, place, kind="openclip")[0]
        check_tokenizer(intake.folder / "tokenizer_2", openclip=True)


def text_encoder_of(
    component: StoredComponent, place: str, *, kind: Kind | None = None
) -> tuple[Mapping[str, StoredTensor], dict[str, Any]]:
    """Return a text encoder under its names in a single file, and what is known of it.

    Args:
        component: The text encoder.
        place: Its place in a single file, such as "cond_stage_model.".
        kind: Its kind; None tells it by its width and its activation.

    Raises:
        CheckpointError: It has tensors that are not known, or two for one, or is not one that is
            exported.
    """
    tensors = text_tensors(component)
    kind = kind or kind_of(component, tensors)
    fields: dict[str, Any] = {"text_layers_trimmed": kind == "openclip"}
    if component.config is not None:
        config = component.path / "config.json"
        fields |= text_encoder_fields(config, component.config, openclip=kind == "openclip")
    return placed(component, tensors, kind, place), fields


def _depth_estimator_of(component: StoredComponent) -> dict[str, StoredTensor]:
    """Return a depth estimator under its names in a single file.

    Raises:
        CheckpointError: It has tensors that are not known, projections that do not go together, or
            is not one that is exported.
    """
    if component.config is not None:
        check_depth_estimator(component.path / "config.json", component.config)
    tensors = renamed(component, "depth estimator", depth_estimator_names(component.tensors))
    for name, parts in projections(component.tensors).items():
        missing = [part for part in parts if part not in component.tensors]
        one = None if missing else joined([component.tensors[part] for part in parts])
        if one is None:
            raise CheckpointError(
                component.path,
                f"has no queries, keys and values that go together ({listed(parts)}); get it again",
            )
        tensors[name] = one
    return tensors


def _read_image_encoder(intake: _Intake) -> None:
    """Read what turns an image into the vector of the UNet, and how noise is added to it."""
    tensors, fields = image_encoder_of(intake.component("image_encoder"))
    intake.tensors |= tensors
    intake.stated |= fields
    intake.tensors |= image_normalizer_of(intake.component("image_normalizer"))
    noise = _scheduler_fields(intake, _NOISING_SCHEDULER)
    if "schedule" in noise:
        intake.stated["augmentation_schedule"] = noise["schedule"]
    path = intake.folder / _FEATURE_EXTRACTOR
    if path.is_file():
        intake.stated |= feature_extractor_fields(path, read_json(path))
        intake.files[_FEATURE_EXTRACTOR] = path


def _scheduler_fields(intake: _Intake, name: str) -> dict[str, Any]:
    """Return what the configuration of a scheduler states; nothing if there is none."""
    path = intake.folder / name
    if not path.is_file():
        return {}
    intake.files[name] = path
    return scheduler_fields(path, read_json(path))
