"""From a form of AUTOMATIC1111's API to the fields of a request."""

from typing import Any

from ldm_runtime.pipeline.infotext import WEB_UI_NOISES
from ldm_runtime.requests.sampler_names import automatic_schedule, known_sampler
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import BY_SIGMA
from ldm_runtime.specs.tasks import task_record
from ldm_serve.errors import invalid
from ldm_serve.routes.a1111.forms import MASK_BLUR, Form, ImageToImageForm, TextToImageForm
from ldm_serve.routes.a1111.options import Options
from ldm_serve.served_models import ServedModel

#: `image_cfg_scale` of a form for a model that takes none.
_IMAGE_CFG_DEFAULTS = (None, 1, 1.5)
#: `hr_scale` of a form that leaves it out.
_SECOND_PASS_SCALE = 2.0


def request_fields(
    form: TextToImageForm | ImageToImageForm, options: Options, model: ServedModel
) -> dict[str, Any]:
    """Return the fields of a request that a form asks for, without its image and mask.

    Args:
        form: The form, of which `check_neutral` holds.
        options: The settings, with those of the form.
        model: The model; a field that means nothing to it is left out where it asks for nothing.

    Raises:
        ServeError: The form contradicts itself.
    """
    takes = task_record(model.spec).takes
    fields: dict[str, Any] = {
        "prompt": form.prompt if form.prompt or "prompt" in takes else None,
        "negative_prompt": form.negative_prompt or None,
        "seed": _seed(form.seed),
        "sampler": _sampler(form),
        "schedule": _schedule(form, model),
        "num_inference_steps": form.steps,
        "guidance_scale": form.cfg_scale,
        "width": form.width,
        "height": form.height,
        "num_images": _num_images(form),
        "eta": form.eta,
    }
    if options.randn_source != "CPU":
        fields["noise"] = WEB_UI_NOISES[options.randn_source]
    if clip_skip := _clip_skip(form, options):
        fields["clip_skip"] = clip_skip
    if form.subseed_strength:
        fields["variation_strength"] = form.subseed_strength
        fields["variation_seed"] = _seed(form.subseed)
    if isinstance(form, TextToImageForm):
        if form.enable_hr:
            fields["hires_scale"] = form.hr_scale or _SECOND_PASS_SCALE
            fields["hires_strength"] = form.denoising_strength
    else:
        fields |= _image_fields(form, takes)
    given = {name: value for name, value in fields.items() if value is not None}
    return _without_idle_eta(given, model)


def _without_idle_eta(fields: dict[str, Any], model: ServedModel) -> dict[str, Any]:
    """Return the fields of a request without an `eta` that would change nothing.

    The web UI sends one with every sampler, and those that have none do not read it.
    """
    name, _ = known_sampler(fields.get("sampler", model.spec.defaults.sampler))
    sampler = SAMPLERS.get(name)
    if fields.get("eta") in (0, 1) and sampler is not None and not sampler.uses_eta:
        return {name: value for name, value in fields.items() if name != "eta"}
    return fields


def _image_fields(form: ImageToImageForm, takes: frozenset[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    # To change all of an image is what a model without a strength does.
    if form.denoising_strength != 1 or "strength" in takes:
        fields["strength"] = form.denoising_strength
    if form.image_cfg_scale not in _IMAGE_CFG_DEFAULTS or "image_guidance_scale" in takes:
        fields["image_guidance_scale"] = form.image_cfg_scale
    if form.mask:
        fields["mask_blur"] = _mask_blur(form)
    return fields


def _mask_blur(form: ImageToImageForm) -> tuple[int, int]:
    """Return the blur of the mask in width and height; one number is for both, and goes first."""
    each = (form.mask_blur_x, form.mask_blur_y)
    width, height = each if form.mask_blur is None else (form.mask_blur, form.mask_blur)
    return MASK_BLUR if width is None else width, MASK_BLUR if height is None else height


def _seed(seed: int | None) -> int | None:
    return None if seed == -1 else seed


def _sampler(form: Form) -> str | None:
    return form.sampler_name or form.sampler_index or None


def _schedule(form: Form, model: ServedModel) -> str | None:
    """Return the schedule that a form means.

    "Automatic", the default, is the web UI's for the sampler that the form names, unless that name
    carries a schedule or the model has none of its timesteps. It is the model's default without a
    name.
    """
    if form.scheduler and form.scheduler.lower() != "automatic":
        return form.scheduler
    sampler, carried = known_sampler(_sampler(form) or "")
    schedule = carried or automatic_schedule(sampler)
    if model.spec.edm is not None and schedule not in BY_SIGMA:
        return None
    return schedule


def _num_images(form: Form) -> int | None:
    if form.batch_size is None and form.n_iter is None:
        return None
    return (form.batch_size or 1) * (form.n_iter or 1)


def _clip_skip(form: Form, options: Options) -> int:
    """Return how many layers are skipped; the web UI counts the layer to end at, from 1."""
    overrides = form.override_settings or {}
    last = options.CLIP_stop_at_last_layers
    if form.clip_skip is None:
        return last - 1
    if form.clip_skip < 1 or overrides.get("CLIP_stop_at_last_layers", form.clip_skip) != (
        form.clip_skip
    ):
        message = "clip_skip: must be at least 1, and that of override_settings if both are given"
        raise invalid("clip_skip", message)
    return form.clip_skip - 1
