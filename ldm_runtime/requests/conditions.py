"""Checks of what a request is conditioned on against one model: what it knows, and how much."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.layouts import max_objects, num_labels
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.networks import ClassEmbedderSpec, RescalerSpec, TextEncoderSpec
from ldm_runtime.text.prompts import parse_prompt


def check_conditions(request: GenerationRequest, spec: ModelSpec) -> None:
    """Check the prompt, class, layout, map or embeddings of a request whose fields fit the task.

    Raises:
        RequestError: A prompt cannot be read, or the model does not know what it is asked for.
    """
    _check_prompts(request)
    for name, check in _CHECKS.items():
        if getattr(request, name) is not None:
            check(request, spec)


def _check_prompts(request: GenerationRequest) -> None:
    if request.plain_prompt:
        return
    for name in ("prompt", "negative_prompt"):
        try:
            parse_prompt(getattr(request, name) or "")
        except ValueError as error:
            raise RequestError(name, str(error)) from error


def _check_class(request: GenerationRequest, spec: ModelSpec) -> None:
    embedder, label = spec.network(ClassEmbedderSpec), request.class_label
    assert label is not None, "only given fields are checked"
    count, null = embedder.num_classes, embedder.null_class
    if label != null and label < count:
        return
    reason = "stands for no class" if label == null else "is no class"
    last = count - 2 if null == count - 1 else count - 1
    but = f" but {null}" if null is not None and null <= last else ""
    raise RequestError("class_label", f"{label} {reason} of this bundle; give 0 to {last}{but}")


def _check_layout(request: GenerationRequest, spec: ModelSpec) -> None:
    encoder = spec.network(TextEncoderSpec)
    assert request.layout is not None, "only given fields are checked"
    most, known = max_objects(encoder), num_labels(encoder)
    if len(request.layout) > most:
        raise RequestError(
            "layout", f"has {len(request.layout)} objects; this bundle takes at most {most}"
        )
    for index, each in enumerate(request.layout):
        if each.label >= known:
            raise RequestError(
                "layout",
                f"object {index} has label {each.label}; this bundle knows 0 to {known - 1}",
            )


def _check_segmentation(request: GenerationRequest, spec: ModelSpec) -> None:
    assert request.segmentation is not None, "only given fields are checked"
    highest, last = int(request.segmentation.ids.max()), spec.network(RescalerSpec).num_classes - 1
    if highest > last:
        raise RequestError(
            "segmentation",
            f"has a pixel of class {highest}; this bundle knows 0 to {last}, one number a pixel",
        )


def _check_embeddings(request: GenerationRequest, spec: ModelSpec) -> None:
    assert spec.unet is not None, "a retrieval model has a UNet"
    assert request.embeddings is not None, "only given fields are checked"
    width = request.embeddings.values.shape[1]
    if width != spec.unet.context_dim:
        raise RequestError(
            "embeddings",
            f"have {width} numbers each; this bundle takes {spec.unet.context_dim}, as the "
            "encoder makes them that it was trained with",
        )


_CHECKS: Mapping[str, Callable[[GenerationRequest, ModelSpec], None]] = MappingProxyType(
    {
        "class_label": _check_class,
        "layout": _check_layout,
        "segmentation": _check_segmentation,
        "embeddings": _check_embeddings,
    }
)
