"""OpenAI's Images API: `/v1/images/generations`, `/v1/images/edits` and `/v1/models`.

Fields, events and errors are those of the `openai` client 3.57. What cannot be honoured is an
error that names the field, never ignored. `seed`, `negative_prompt`, `num_inference_steps`,
`guidance_scale`, `sampler` and `strength` are extensions, under the names of vLLM-Omni, and so is
`adapters`.
"""

import base64
import io
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ldm_runtime.inputs.reading import shown
from ldm_serve.adapters import AdapterChoices
from ldm_serve.answers import convert, events_answer, json_answer, read_json
from ldm_serve.board import Wish
from ldm_serve.errors import ServeError, invalid
from ldm_serve.executors.messages import Finished, ImageFormat, Quality
from ldm_serve.jobs import Job
from ldm_serve.masks import edit_mask
from ldm_serve.routes.jobs import adapters_json, data_url, quality_of
from ldm_serve.served_models import ServedModel
from ldm_serve.site import Site, Submission, deadline_of

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_MAX_PARTIAL_IMAGES = 3
_MAX_FORM_FIELDS, _MAX_FORM_FILES = 64, 4
_MAX_PART_BYTES = 256 * 2**10

#: Values of fields that are not ours which ask for nothing special.
_NEUTRAL: Mapping[str, frozenset[object]] = MappingProxyType(
    {
        "quality": frozenset({None, "auto", "standard"}),
        "background": frozenset({None, "auto", "opaque"}),
        "moderation": frozenset({None, "auto", "low"}),
        "input_fidelity": frozenset({None, "low"}),
        **dict.fromkeys(
            ("style", "complexity", "frame_count", "frame_duration_ms", "svg", "markup"),
            frozenset({None}),
        ),
    }
)


class ImageRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of `POST /v1/images/generations`; the form of an edit has the same fields.

    `user` and `safety_identifier` are personal data, and neither kept nor logged.
    """

    prompt: str
    model: str | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=10)] | None = None
    size: str | None = None
    response_format: Literal["b64_json", "url", "file"] | None = None
    output_format: ImageFormat | None = None
    output_compression: Quality | None = None
    stream: bool | None = None
    partial_images: Annotated[int, msgspec.Meta(ge=0, le=_MAX_PARTIAL_IMAGES)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    # Extensions.
    seed: int | None = None
    negative_prompt: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    strength: float | None = None
    adapters: AdapterChoices | None = None
    # Fields that only their neutral values leave without an error.
    quality: str | None = None
    background: str | None = None
    moderation: str | None = None
    input_fidelity: str | None = None
    style: Any = None
    complexity: Any = None
    frame_count: Any = None
    frame_duration_ms: Any = None
    svg: Any = None
    markup: Any = None


class OpenAIRoutes:
    """The routes below `/v1`.

    Args:
        site: The server.
    """

    def __init__(self, site: Site) -> None:
        self._site = site

    def routes(self) -> list[Route]:
        """Return the routes."""
        counted = self._site.counted
        return [
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.model),
            Route("/v1/images/generations", counted(self.generations), methods=["POST"]),
            Route("/v1/images/edits", counted(self.edits), methods=["POST"]),
            Route("/v1/images/variations", self.variations, methods=["POST"]),
        ]

    async def models(self, _: Request) -> Response:
        """List the models."""
        data = [_model_json(each) for each in self._site.models.values()]
        return json_answer({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        """Describe one model."""
        return json_answer(_model_json(self._site.models.find(request.path_params["model"])))

    async def generations(self, request: Request) -> Response:
        """Generate images from a prompt."""
        body = await read_json(request, ImageRequest)
        return await self._answer(request, body, dict, "image_generation")

    async def edits(self, request: Request) -> Response:
        """Generate images from a prompt, an image, and a mask whose transparent pixels change."""
        parts = await _form_of(request)
        try:
            files = {name: value for name, value in parts.multi_items() if _is_file(value)}
            texts = {name: value for name, value in parts.multi_items() if isinstance(value, str)}
            images = [*parts.getlist("image"), *parts.getlist("image[]")]
            _check_single(parts)
            decode = partial(_edit_inputs, *await _edit_files(images, files))
        finally:
            await parts.close()
        return await self._answer(request, convert(texts, ImageRequest), decode, "image_edit")

    async def variations(self, _: Request) -> Response:
        """Answer that OpenAI has ended this interface, too."""
        message = "variations no longer exist; edit the image with /v1/images/edits"
        raise ServeError(410, "gone", message)

    async def _answer(
        self,
        request: Request,
        body: ImageRequest,
        decode: Callable[[], Mapping[str, Any]],
        kind: str,
    ) -> Response:
        _check_neutral(body)
        _check_delivery(body)
        wish = _wish(body, deadline_of(request))
        try:
            submission = Submission(
                fields=_fields(body),
                wish=wish,
                model=body.model,
                adapters=body.adapters,
                decode=decode,
            )
            job = await self._site.submit(request, submission)
        except ServeError as error:
            error.rename_field(_PARAMS)
            raise
        if body.stream:
            return events_answer(self._events(job, body.partial_images or 0, kind))
        result = await self._site.images_of(request, job)
        if body.response_format != "url":
            job.unfetched.clear()
        if body.response_format == "file":
            return Response(result.images[0], media_type=f"image/{wish.format}")
        base = str(request.base_url) if body.response_format == "url" else None
        return json_answer(_images_json(job, result, base))

    async def _events(
        self, job: Job, partial_images: int, kind: str
    ) -> AsyncIterator[tuple[str, Any]]:
        """Yield previews as they come, and the images at the end."""
        sent = 0
        try:
            async for _ in job.changes():
                is_due = job.progress >= (sent + 1) / (partial_images + 1)
                if sent < partial_images and job.preview is not None and is_due and not job.is_over:
                    data = await run_in_threadpool(_enlarged, job.preview, job)
                    event = {**_event(job, data), "partial_image_index": sent}
                    yield f"{kind}.partial_image", {"type": f"{kind}.partial_image", **event}
                    sent += 1
            if job.error is not None:
                yield "error", job.error.body
            for data in [] if job.result is None else job.result.images:
                event = {**_event(job, data), "usage": _USAGE, "ldm": _extension(job)}
                yield f"{kind}.completed", {"type": f"{kind}.completed", **event}
        finally:
            self._site.board.cancel(job)  # the client is gone, unless it is over
            job.unfetched.clear()


#: Names of our fields in this interface.
_PARAMS = MappingProxyType(
    {
        "num_images": "n",
        "width": "size",
        "height": "size",
        "mask_image": "mask",
        "previews": "partial_images",
    }
)
_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}


class _FormInMemory(MultiPartParser):
    """Keeps uploads in memory, which the limit of the body bounds: none is ever on the disk."""

    spool_max_size = 0  # of no spooled file, as in the standard library


async def _form_of(request: Request) -> FormData:
    """Return the parts of a form.

    Raises:
        ServeError: The body is not a form, or not a whole one.
    """
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        named = shown(kind) or "of no type"
        raise invalid(None, f"the body must be multipart/form-data, not {named}")
    parser = _FormInMemory(
        request.headers,
        request.stream(),
        max_files=_MAX_FORM_FILES,
        max_fields=_MAX_FORM_FIELDS,
        max_part_size=_MAX_PART_BYTES,
    )
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise invalid(None, f"the form cannot be read: {error.message}") from error


def _model_json(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.alias,
        "object": "model",
        "created": model.created,
        "owned_by": "ldm-deploy",
        "adapters": list(model.adapters),
    }


def _check_neutral(body: ImageRequest) -> None:
    for name, values in _NEUTRAL.items():
        value = getattr(body, name)
        if isinstance(value, dict | list) or value not in values:
            known = sorted(str(each) for each in values if each is not None)
            fix = f"leave it out or send {' or '.join(known)}" if known else "leave it out"
            raise invalid(name, f"{name}: this server cannot do that; {fix}", "unsupported_value")


def _check_delivery(body: ImageRequest) -> None:
    """Check that the images can be delivered in the ways that a body asks for, all at once."""
    if body.response_format == "file" and (body.stream or (body.n or 1) > 1):
        raise invalid("response_format", "response_format: a file is one image, not streamed")
    if body.response_format == "url" and body.stream:
        message = "response_format: a stream has the images in it; leave it out or send b64_json"
        raise invalid("response_format", message)
    if body.partial_images and not body.stream:
        message = "partial_images: are parts of a stream; leave them out, or send stream: true"
        raise invalid("partial_images", message)


def _wish(body: ImageRequest, deadline_seconds: float | None) -> Wish:
    """Return how a body wants its images.

    Args:
        body: The body.
        deadline_seconds: How long its client waits for the next bytes of an answer.
    """
    image_format: ImageFormat = body.output_format or "png"
    previews = bool(body.stream and body.partial_images)
    return Wish(
        format=image_format,
        quality=quality_of(image_format, body.output_compression),
        previews=previews,
        needs_previews=previews,
        # Previews are bytes, too; a client that gives up between two leaves the stream.
        deadline_seconds=None if previews else deadline_seconds,
    )


def _fields(body: ImageRequest) -> dict[str, Any]:
    names = ("prompt", "seed", "negative_prompt", "num_inference_steps", "sampler", "strength")
    fields = {name: getattr(body, name) for name in names}
    fields |= {"guidance_scale": body.guidance_scale, "num_images": body.n}
    if body.size not in (None, "auto"):
        found = _SIZE.fullmatch(body.size)
        if found is None:
            raise invalid("size", f"size: must be WIDTHxHEIGHT or auto, got {body.size[:40]!r}")
        fields["width"], fields["height"] = int(found[1]), int(found[2])
    return fields


def _is_file(value: object) -> bool:
    return isinstance(value, UploadFile)


def _check_single(parts: FormData) -> None:
    """Check that a form has no field twice, but for images, whose number is checked elsewhere."""
    for name in set(parts).difference({"image", "image[]"}):
        if len(parts.getlist(name)) > 1:
            raise invalid(name, f"{name}: is there more than once; send it once")


async def _edit_files(images: list[Any], files: Mapping[str, Any]) -> tuple[bytes, bytes | None]:
    """Return the files of the image and of the mask, if there is one, of a form.

    Raises:
        ServeError: There are others, or not one image.
    """
    unknown = set(files).difference({"image", "image[]", "mask"})
    if unknown:
        name = min(unknown)
        raise invalid(name, f"{name}: unknown file", "unknown_parameter")
    if len(images) != 1 or not _is_file(images[0]):
        message = f"image: send one image file, got {len(images)} values"
        raise invalid("image", message)
    mask = files.get("mask")
    return await images[0].read(), None if mask is None else await mask.read()


def _edit_inputs(image: bytes, mask: bytes | None) -> dict[str, str]:
    """Return the image and the mask of an edit as fields of a request.

    Raises:
        ServeError: The mask is not an image with an alpha channel.
    """
    inputs = {"image": data_url(image, "png")}
    if mask is not None:
        inputs["mask_image"] = data_url(edit_mask(mask), "png")
    return inputs


def _images_json(job: Job, result: Finished, base: str | None) -> dict[str, Any]:
    """Return the answer to a call that was not streamed.

    Args:
        job: The job.
        result: Its images.
        base: Address of this server, for images that are given by address.
    """
    if base is None:
        data = [{"b64_json": base64.b64encode(each).decode()} for each in result.images]
    else:
        count = range(len(result.images))
        data = [{"url": f"{base}files/{job.id}/{index}"} for index in count]
    return {**_about(job), "data": data, "usage": _USAGE, "ldm": _extension(job)}


def _event(job: Job, data: bytes) -> dict[str, Any]:
    return {**_about(job, "created_at"), "b64_json": base64.b64encode(data).decode()}


def _about(job: Job, created: str = "created") -> dict[str, Any]:
    request = job.checked.request
    return {
        created: int(time.time()),
        "background": "opaque",
        "output_format": job.work.format,
        "quality": "auto",
        "size": f"{request.width}x{request.height}",
    }


def _extension(job: Job) -> dict[str, Any]:
    """Return what OpenAI's interface has no place for: how to generate the images again."""
    request, result = job.checked.request, job.result
    return {
        "id": job.id,
        "model": job.checked.model.name,
        "adapters": adapters_json(job),
        "bundle_sha256": job.checked.model.bundle_sha256,
        "seed": request.seed,
        "sampler": request.sampler,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "timings": {} if result is None else result.timings,
    }


def _enlarged(preview: bytes, job: Job) -> bytes:
    """Return a preview as an image of the size and format that the job asks for."""
    request, file = job.checked.request, io.BytesIO()
    with Image.open(io.BytesIO(preview), formats=["PNG"]) as image:
        large = image.resize((request.width, request.height), Image.Resampling.BICUBIC)
        large.save(file, format=job.work.format.upper())
    return file.getvalue()
