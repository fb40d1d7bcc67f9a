"""Conditions of requests, and their checks against the classes and limits of one model."""

from collections.abc import Sequence

from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.layouts import LayoutObject, label_number, max_objects, num_labels
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolved import (
    ClassCondition,
    Condition,
    EmbeddingsCondition,
    LayoutCondition,
    NoCondition,
    PromptCondition,
    SegmentationCondition,
)
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.networks import (
    ClassEmbedderSpec,
    SegmentationEncoderSpec,
    TextEncoderSpec,
    UNetSpec,
)
from ldm_runtime.specs.tasks import takes_prompts


def condition_of(request: GenerationRequest, spec: ModelSpec) -> Condition:
    """Return the condition of a request whose fields fit its model's task.

    Raises:
        RequestError: The model has no label of that name.
    """
    if request.prompt is not None or takes_prompts(spec):
        return PromptCondition(
            prompt=request.prompt or "",
            negative_prompt=request.negative_prompt,
            literal=request.literal_prompt,
            clip_skip=request.clip_skip,
        )
    if request.class_label is not None:
        return ClassCondition(label=_class_number(request.class_label, spec.label_names))
    if request.layout is not None:
        return LayoutCondition(objects=_numbered(request.layout, spec.label_names))
    if request.segmentation is not None:
        return SegmentationCondition(segmentation=request.segmentation)
    if request.embeddings is not None:
        return EmbeddingsCondition(embeddings=request.embeddings)
    return NoCondition()


def check_condition(condition: Condition, spec: ModelSpec) -> None:
    """Check a condition against the model that it is for.

    Raises:
        RequestError: The model does not know what it is asked for.
    """
    match condition:
        case PromptCondition():
            _check_clip_skip(condition.clip_skip, spec)
        case ClassCondition():
            _check_class(condition.label, spec.network(ClassEmbedderSpec))
        case LayoutCondition():
            _check_layout(condition, spec.network(TextEncoderSpec))
        case SegmentationCondition():
            _check_segmentation(condition, spec.network(SegmentationEncoderSpec))
        case EmbeddingsCondition():
            _check_embeddings(condition, spec.network(UNetSpec))


def _class_number(label: int | str, names: Sequence[str]) -> int:
    try:
        return label_number(label, names)
    except ValueError as error:
        raise RequestError("class_label", str(error)) from error


def _numbered(layout: Sequence[LayoutObject], names: Sequence[str]) -> tuple[LayoutObject, ...]:
    numbered = []
    for index, each in enumerate(layout):
        try:
            numbered.append(each.numbered(names))
        except ValueError as error:
            raise RequestError("layout", f"object {index}: {error}") from error
    return tuple(numbered)


def _check_clip_skip(clip_skip: int, spec: ModelSpec) -> None:
    encoders = [each for each in spec.networks.values() if isinstance(each, TextEncoderSpec)]
    most = min((each.num_clip_skips or 1 for each in encoders), default=1) - 1
    if clip_skip <= most:
        return
    if most == 0:
        raise RequestError(
            "clip_skip",
            f"is {clip_skip}, but this bundle's text encoder skips no layers; leave it out",
        )
    raise RequestError(
        "clip_skip", f"is {clip_skip}, but one layer is left after {most}; give 0 to {most}"
    )


def _check_class(label: int, embedder: ClassEmbedderSpec) -> None:
    count, null = embedder.num_classes, embedder.null_class
    if label != null and label < count:
        return
    reason = "stands for no class" if label == null else "is not a class"
    last = count - 2 if null == count - 1 else count - 1
    but = f" but {null}" if null is not None and null <= last else ""
    raise RequestError("class_label", f"{label} {reason} of this bundle; give 0 to {last}{but}")


def _check_layout(condition: LayoutCondition, encoder: TextEncoderSpec) -> None:
    most, known = max_objects(encoder), num_labels(encoder)
    if len(condition.objects) > most:
        raise RequestError(
            "layout", f"has {len(condition.objects)} objects; this bundle takes at most {most}"
        )
    for index, each in enumerate(condition.objects):
        if each.number >= known:
            raise RequestError(
                "layout",
                f"object {index} has label {each.number}; this bundle knows 0 to {known - 1}",
            )


def _check_segmentation(
    condition: SegmentationCondition, segmentation_encoder: SegmentationEncoderSpec
) -> None:
    highest, last = int(condition.segmentation.ids.max()), segmentation_encoder.num_classes - 1
    if highest > last:
        raise RequestError(
            "segmentation",
            f"has a pixel of class {highest}; this bundle knows 0 to {last}, one number per pixel",
        )


def _check_embeddings(condition: EmbeddingsCondition, unet: UNetSpec) -> None:
    width = condition.embeddings.values.shape[1]
    if width != unet.context_dim:
        raise RequestError(
            "embeddings",
            f"have {width} numbers each; this bundle takes {unet.context_dim}, as the encoder "
            "makes them that it was trained with",
        )
