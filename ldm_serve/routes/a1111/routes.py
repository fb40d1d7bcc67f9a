"""AUTOMATIC1111's API: `/sdapi/v1/txt2img`, `img2img`, and what its clients ask around them.

Each key has settings of its own, among them the model that it switches to; they are gone when the
server ends. Paths, fields and answers: AUTOMATIC1111/stable-diffusion-webui 1.10,
`modules/api/api.py`.
"""

import base64
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ldm_runtime.adapters.tags import without_tags
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.inputs.reading import is_data_url
from ldm_serve.answers import json_answer, read_json
from ldm_serve.board import Wish
from ldm_serve.errors import ServeError, invalid
from ldm_serve.masks import web_ui_mask
from ldm_serve.routes.a1111.checkpoints import FIELD, find_checkpoint, listed, title
from ldm_serve.routes.a1111.extra_networks import tagged_adapters
from ldm_serve.routes.a1111.fields import request_fields
from ldm_serve.routes.a1111.forms import (
    ImageToImageForm,
    TextToImageForm,
    check_image_size,
    check_neutral,
)
from ldm_serve.routes.a1111.info import info_text, png_info
from ldm_serve.routes.a1111.lists import LISTS, lora
from ldm_serve.routes.a1111.options import Options
from ldm_serve.routes.a1111.sessions import Session, timestamp
from ldm_serve.routes.jobs import data_url
from ldm_serve.served_models import ServedModel
from ldm_serve.site import Endpoint, Site, Submission, deadline_of

_ROOT = "/sdapi/v1"
_TRUE = frozenset({"1", "true", "on", "yes"})
_FALSE = frozenset({"", "0", "false", "off", "no"})
#: Names of our fields in this interface.
_PARAMS: Mapping[str, str] = MappingProxyType(
    {
        "num_images": "batch_size",
        "num_inference_steps": "steps",
        "guidance_scale": "cfg_scale",
        "image_guidance_scale": "image_cfg_scale",
        "sampler": "sampler_name",
        "schedule": "scheduler",
        "noise": "randn_source",
        "variation_seed": "subseed",
        "variation_strength": "subseed_strength",
        "image": "init_images",
        "mask_image": "mask",
        "strength": "denoising_strength",
        "adapters": "prompt",
        "hires_scale": "hr_scale",
        "hires_strength": "denoising_strength",
        "model": FIELD,
    }
)


class PngInfoForm(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /sdapi/v1/png-info`."""

    image: str


class A1111Routes:
    """The routes below `/sdapi/v1`.

    Args:
        site: The server.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._sessions: dict[str, Session] = {}

    def routes(self) -> list[Route]:
        """Return the routes."""
        asked = {
            "progress": self.progress,
            "options": self.options,
            "sd-models": self.models,
            "loras": self.loras,
        }
        sent = {
            "txt2img": self._site.counted(self.text_to_image),
            "img2img": self._site.counted(self.image_to_image),
            "interrupt": self.interrupt,
            "skip": self.skip,
            "options": self.change_options,
            "png-info": self.png_info,
        }
        return [
            *(Route(f"{_ROOT}/{name}", answer) for name, answer in asked.items()),
            *(Route(f"{_ROOT}/{name}", answer, methods=["POST"]) for name, answer in sent.items()),
            *(Route(f"{_ROOT}/{name}", _fixed(value)) for name, value in LISTS.items()),
        ]

    async def text_to_image(self, request: Request) -> Response:
        """Generate images from a prompt."""
        form = await read_json(request, TextToImageForm)
        check_neutral(form)
        return await self._generate(request, form, dict)

    async def image_to_image(self, request: Request) -> Response:
        """Generate images from an image, of which a mask may say what changes."""
        form = await read_json(request, ImageToImageForm)
        check_neutral(form)
        return await self._generate(request, form, partial(_image_inputs, form))

    async def progress(self, request: Request) -> Response:
        """Answer with the progress of the job of the key that came first."""
        skips_image = _flag(request, "skip_current_image")
        return json_answer(self._session(request).progress(has_image=not skips_image))

    async def interrupt(self, request: Request) -> Response:
        """Cancel the jobs of the key that are being generated, or the first that waits."""
        for job in self._session(request).interrupted():
            self._site.board.cancel(job)
        return json_answer({})

    async def skip(self, request: Request) -> Response:
        """Cancel the job of the key that came first."""
        for job in self._session(request).interrupted()[:1]:
            self._site.board.cancel(job)
        return json_answer(None)

    async def options(self, request: Request) -> Response:
        """Answer with the settings of the key."""
        options = self._session(request).options
        model = self._model(options)
        names = {FIELD: title(model), "sd_checkpoint_hash": model.checkpoint_sha256}
        return json_answer(msgspec.structs.asdict(options) | names)

    async def change_options(self, request: Request) -> Response:
        """Change settings of the key; those that it does not name stay as they are."""
        changes = await read_json(request, dict[str, Any])
        # Clients send back all that they were told.
        changes.pop("sd_checkpoint_hash", None)
        session = self._session(request)
        options = session.options.changed(changes)
        self._model(options)
        session.options = options
        return json_answer(None)

    async def models(self, _: Request) -> Response:
        """List the models."""
        return json_answer(listed(self._site.models))

    async def loras(self, _: Request) -> Response:
        """List the adapters."""
        models = self._site.models.values()
        adapters = {name: each for model in models for name, each in model.adapters.items()}
        return json_answer([lora(adapters[name]) for name in sorted(adapters)])

    async def png_info(self, request: Request) -> Response:
        """Answer with what an image file says of how it was made."""
        form = await read_json(request, PngInfoForm)
        self._site.board.take_token(request.state.key)
        return json_answer(await self._site.check(png_info, _url(form.image.strip())))

    async def _generate(
        self,
        request: Request,
        form: TextToImageForm | ImageToImageForm,
        decode: Callable[[], Mapping[str, Any]],
    ) -> Response:
        session = self._session(request)
        submission = self._submission(form, session.options, decode, deadline_of(request))
        try:
            job = await self._site.submit(request, submission)
            with session.following(job):
                result = await self._site.images_of(request, job)
        except ServeError as error:
            error.rename_field(_PARAMS)
            raise
        job.unfetched.clear()
        sends_images = form.send_images is not False
        images = [base64.b64encode(each).decode() for each in result.images if sends_images]
        info = info_text(job, result, form, timestamp(job))
        return json_answer({"images": images, "parameters": _parameters(form), "info": info})

    def _submission(
        self,
        form: TextToImageForm | ImageToImageForm,
        options: Options,
        decode: Callable[[], Mapping[str, Any]],
        deadline_seconds: float | None,
    ) -> Submission:
        """Return the request that a form asks for.

        Args:
            form: The form.
            options: The settings of its key.
            decode: Returns the fields of its images.
            deadline_seconds: How long its client waits.
        """
        options = options.changed(form.override_settings or {})
        model = self._model(options)
        adapters = [] if form.disable_extra_networks else tagged_adapters(form.prompt)
        plain = msgspec.structs.replace(form, prompt=without_tags(form.prompt))
        return Submission(
            fields=request_fields(plain, options, model),
            wish=Wish(
                format=options.image_format, previews=True, deadline_seconds=deadline_seconds
            ),
            model=model.alias,
            adapters=adapters or None,
            decode=decode,
        )

    def _session(self, request: Request) -> Session:
        return self._sessions.setdefault(request.state.key, Session())

    def _model(self, options: Options) -> ServedModel:
        return find_checkpoint(self._site.models, options.sd_model_checkpoint)


def _image_inputs(form: ImageToImageForm) -> dict[str, str]:
    """Return the image and the mask of a form as fields of a request.

    Raises:
        ServeError: It has not one image, or asks to fit it in a way that is not here.
    """
    images = form.init_images or []
    if len(images) != 1:
        raise invalid("init_images", f"init_images: send one image, got {len(images)}")
    inputs = {"image": _url(images[0])}
    if form.resize_mode or form.inpaint_full_res:
        try:
            size = InputImage.read(inputs["image"]).size
        except ValueError as error:
            raise invalid("init_images", f"init_images: {error}") from error
        check_image_size(form, size)
    if form.mask:
        mask = web_ui_mask(_url(form.mask), invert=bool(form.inpainting_mask_invert))
        inputs["mask_image"] = data_url(mask, "png")
    return inputs


def _url(image: str) -> str:
    """Return an image in base64, with or without the beginning of a `data:` URL, as such a URL."""
    return image if is_data_url(image) else f"data:image/png;base64,{image}"


def _flag(request: Request, name: str) -> bool:
    """Return a value of the query that is true or false.

    Raises:
        ServeError: It is neither.
    """
    text = request.query_params.get(name, "").lower()
    if text not in _TRUE | _FALSE:
        raise invalid(name, f"{name}: send true or false")
    return text in _TRUE


def _parameters(form: TextToImageForm | ImageToImageForm) -> dict[str, Any]:
    """Return the form as the answer has it: with its images only if it asks for them."""
    fields = msgspec.structs.asdict(form)
    if isinstance(form, ImageToImageForm) and not form.include_init_images:
        fields |= {"init_images": None, "mask": None}
    return fields


def _fixed(value: object) -> Endpoint:
    async def answer(_: Request) -> Response:
        return json_answer(value)

    return answer
