"""How images were made, as AUTOMATIC1111's API says it: `info` of an answer, and `png-info`."""

import io
import re
from typing import Any

import msgspec

from ldm_runtime.errors import LdmError
from ldm_runtime.inputs.reading import data_of_url
from ldm_runtime.pipeline.image_files import METADATA_KEY, read_texts
from ldm_runtime.pipeline.infotext import infotext_parts
from ldm_runtime.requests.resolved import (
    MaskedImage,
    NoImage,
    PromptCondition,
    ResolvedRequest,
)
from ldm_runtime.requests.sampler_names import WEB_UI_SCHEDULES, web_ui_sampler
from ldm_runtime.specs.tasks import task_record
from ldm_runtime.version import version
from ldm_serve.errors import invalid
from ldm_serve.executors.messages import Finished
from ldm_serve.jobs import Job
from ldm_serve.routes.a1111.forms import ImageToImageForm, TextToImageForm

_PAIR = re.compile(r"(\d+)x(\d+)")


def info_text(
    job: Job, result: Finished, form: TextToImageForm | ImageToImageForm, timestamp: str
) -> str:
    """Return the `info` of an answer: JSON that says how each image was made, as text.

    Args:
        job: The job.
        result: Its images.
        form: The form that asked for them.
        timestamp: When it came.

    Source of the names: `Processed.js` in `modules/processing.py` of the web UI.
    """
    request, model = job.checked.request, job.checked.model
    values = {
        **_prompts(request, form, len(result.images)),
        **_seeds(request, result),
        "width": request.width,
        "height": request.height,
        "sampler_name": web_ui_sampler(request.sampler),
        "cfg_scale": request.guidance_scale,
        "steps": request.num_inference_steps,
        "batch_size": form.batch_size or 1,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": model.name,
        "sd_model_hash": model.short_hash,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "denoising_strength": _strength(request, form),
        "extra_generation_params": _extra(request),
        "index_of_first_image": 0,
        "infotexts": [text or "" for text in result.infotexts],
        "styles": [],
        "job_timestamp": timestamp,
        "is_using_inpainting_conditioning": isinstance(request.source_image, MaskedImage)
        and task_record(model.spec).image == "condition",
        "version": f"ldm-deploy {version()}",
    }
    return msgspec.json.encode(values).decode()


def _prompts(
    request: ResolvedRequest, form: TextToImageForm | ImageToImageForm, count: int
) -> dict[str, Any]:
    """Return the prompts of the images; a model without prompts was sent none."""
    prompt, negative, clip_skip = form.prompt, form.negative_prompt or "", 0
    if isinstance(condition := request.condition, PromptCondition):
        negative, clip_skip = condition.negative_prompt, condition.clip_skip
    return {
        "prompt": prompt,
        "all_prompts": [prompt] * count,
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * count,
        "clip_skip": clip_skip + 1,
    }


def _seeds(request: ResolvedRequest, result: Finished) -> dict[str, Any]:
    indices = range(len(result.images))
    return {
        "seed": result.seeds[0],
        "all_seeds": result.seeds,
        "subseed": request.variation_seed,
        "all_subseeds": [request.variation_seed + index for index in indices],
        "subseed_strength": request.variation_strength,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
    }


def _extra(request: ResolvedRequest) -> dict[str, Any]:
    """Return what has no field of its own: the schedule, and what became of a mask."""
    schedule = WEB_UI_SCHEDULES.get(request.schedule, request.schedule)
    if not isinstance(request.source_image, MaskedImage):
        return {"Schedule type": schedule}
    width, height = request.source_image.blur
    return {
        "Schedule type": schedule,
        "Mask blur": width if width == height else None,
        "Masked content": "original",
        "Inpaint area": "Whole picture",  # codespell:ignore
    }


def _strength(request: ResolvedRequest, form: TextToImageForm | ImageToImageForm) -> float | None:
    """Return the strength of the pass that began with an image, or what the form says of none."""
    if isinstance(request.source_image, NoImage) and len(request.passes) == 1:
        return form.denoising_strength
    return request.passes[-1].strength if request.passes else None


def png_info(url: str) -> dict[str, Any]:
    """Return the texts of an image file: the web UI's, its parts, and this program's own.

    Args:
        url: The file as a `data:` URL; no pixel is decoded.

    Raises:
        ServeError: It is not an image file.
    """
    try:
        texts = read_texts(io.BytesIO(data_of_url(url)), "the image")
    except (ValueError, LdmError) as error:
        message = "image: cannot be read as PNG, JPEG or WebP; send such a file in base64"
        raise invalid("image", message) from error
    return {
        "info": texts.infotext or "",
        "items": {} if texts.metadata is None else {METADATA_KEY: texts.metadata},
        "parameters": _parameters(texts.infotext or ""),
    }


def _parameters(infotext: str) -> dict[str, str]:
    """Return the parts of a text with the names that the web UI's own reader gives them."""
    parts = infotext_parts(infotext)
    if parts is None:
        return {"Prompt": infotext.strip(), "Negative prompt": ""} if infotext else {}
    found = {"Prompt": parts.prompt, "Negative prompt": parts.negative_prompt}
    for name, value in parts.values.items():
        if pair := _PAIR.fullmatch(value):
            found |= {f"{name}-1": pair[1], f"{name}-2": pair[2]}
        else:
            found[name] = value
    return found
