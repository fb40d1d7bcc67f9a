"""The forms of AUTOMATIC1111's API, and what they may not ask for.

Clients of the web UI send its whole form, most of it at values that ask for nothing. Every field of
its forms is known here; one that asks for what this server cannot do is an error, never ignored.

Fields: AUTOMATIC1111/stable-diffusion-webui 1.10, `modules/api/models.py` and the constructors in
`modules/processing.py`.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, TypeAlias

import msgspec

from ldm_runtime.adapters.tags import without_tags
from ldm_runtime.inputs.masks import MAX_BLUR
from ldm_serve.routes.a1111.options import NO_NAME, cannot, check_value

#: The one way in which the runtime enlarges an image for a second pass.
UPSCALER = "Lanczos"

#: Blur of a mask in a form that says nothing of it.
MASK_BLUR = 4

Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1)] | None
Blur: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=MAX_BLUR)] | None


class Form(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The fields that both forms have. What is left out is up to the model."""

    prompt: str = ""
    negative_prompt: str | None = None
    seed: int | None = None
    subseed: int | None = None
    subseed_strength: float | None = None
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    batch_size: Count = None
    n_iter: Count = None
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    eta: float | None = None
    denoising_strength: float | None = None
    clip_skip: int | None = None
    override_settings: dict[str, Any] | None = None
    override_settings_restore_afterwards: bool | None = None
    send_images: bool | None = None
    do_not_save_samples: bool | None = None
    do_not_save_grid: bool | None = None
    disable_extra_networks: bool | None = None
    # They bound the noise of `s_churn`, and say when the refiner begins.
    s_tmin: float | None = None
    s_tmax: float | None = None
    refiner_switch_at: float | None = None
    # Fields that only their neutral values leave without an error.
    save_images: Any = None
    styles: Any = None
    seed_resize_from_h: Any = None
    seed_resize_from_w: Any = None
    restore_faces: Any = None
    tiling: Any = None
    s_min_uncond: Any = None
    s_churn: Any = None
    s_noise: Any = None
    refiner_checkpoint: Any = None
    comments: Any = None
    firstpass_image: Any = None
    force_task_id: Any = None
    script_name: Any = None
    script_args: Any = None
    alwayson_scripts: Any = None
    infotext: Any = None


class TextToImageForm(Form):
    """The body of `POST /sdapi/v1/txt2img`."""

    enable_hr: bool | None = None
    hr_scale: float | None = None
    # The rest means something with `enable_hr` alone.
    hr_upscaler: Any = None
    hr_second_pass_steps: Any = None
    hr_resize_x: Any = None
    hr_resize_y: Any = None
    hr_checkpoint_name: Any = None
    hr_sampler_name: Any = None
    hr_scheduler: Any = None
    hr_prompt: Any = None
    hr_negative_prompt: Any = None
    firstphase_width: Any = None
    firstphase_height: Any = None


class ImageToImageForm(Form):
    """The body of `POST /sdapi/v1/img2img`."""

    init_images: list[str] | None = None
    image_cfg_scale: float | None = None
    mask: str | None = None
    inpainting_mask_invert: bool | int | None = None
    include_init_images: bool | None = None
    resize_mode: int | None = None
    inpaint_full_res: bool | int | None = None
    initial_noise_multiplier: Any = None
    latent_mask: Any = None
    # These mean something with a mask alone.
    mask_blur: Blur = None
    mask_blur_x: Blur = None
    mask_blur_y: Blur = None
    mask_round: Any = None
    inpainting_fill: Any = None
    inpaint_full_res_padding: Any = None


_OFF = (None, False)
_UNSET = (None, 0, -1)
#: Values of fields that ask for nothing special.
_NEUTRAL: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        # Nothing is written to a disk.
        "save_images": _OFF,
        "styles": (None, [], [""]),
        "seed_resize_from_h": _UNSET,
        "seed_resize_from_w": _UNSET,
        "restore_faces": _OFF,
        "tiling": _OFF,
        "s_min_uncond": (None, 0),
        "s_churn": (None, 0),
        "s_noise": (None, 1),
        "refiner_checkpoint": NO_NAME,
        "comments": (None, {}),
        "firstpass_image": (None, ""),
        "force_task_id": (None, ""),
        "script_name": NO_NAME,
        "script_args": (None, []),
        "alwayson_scripts": (None, {}),
        "infotext": (None, ""),
        # Of images alone.
        "initial_noise_multiplier": (None, 1),
        "latent_mask": (None, ""),
    }
)
_NEUTRAL_WITH_SECOND_PASS: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "hr_upscaler": (None, "", UPSCALER),
        "hr_second_pass_steps": (None, 0),
        "hr_resize_x": (None, 0),
        "hr_resize_y": (None, 0),
        "hr_checkpoint_name": (None, "", "Use same checkpoint"),
        "hr_sampler_name": (None, "", "Use same sampler"),
        "hr_scheduler": (None, "", "Use same scheduler"),
        "hr_prompt": (None, ""),
        "hr_negative_prompt": (None, ""),
        "firstphase_width": (None, 0),
        "firstphase_height": (None, 0),
    }
)
# Masked pixels begin as they are. The web UI's default, 0, stands for that, too: clients send it
# unasked.
_NEUTRAL_WITH_MASK: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "mask_round": (None, True),
        "inpainting_fill": (None, 0, 1),
    }
)
_EXTRA_NETWORK = re.compile(r"<(lora|lyco|hypernet)\s*:", re.IGNORECASE)


def check_neutral(form: TextToImageForm | ImageToImageForm) -> None:
    """Check that a form asks for nothing that this server cannot do.

    Raises:
        ServeError: It does; the message names the field and the value to send.
    """
    tables = [_NEUTRAL]
    if isinstance(form, TextToImageForm):
        tables += [_NEUTRAL_WITH_SECOND_PASS] if form.enable_hr else []
    else:
        tables += [_NEUTRAL_WITH_MASK] if form.mask else []
    for table in tables:
        for name, values in table.items():
            check_value(name, getattr(form, name, None), values)
    if form.override_settings_restore_afterwards is False and form.override_settings:
        fix = "send true; POST /sdapi/v1/options keeps settings"
        raise cannot("override_settings_restore_afterwards", fix)
    if _EXTRA_NETWORK.search(without_tags(form.prompt)):
        raise cannot("prompt", "leave out of it what is not <lora:NAME:SCALE>")
    if _EXTRA_NETWORK.search(form.negative_prompt or ""):
        raise cannot("negative_prompt", "leave <lora:…> and its like out of it")


def check_image_size(form: ImageToImageForm, size: tuple[int, int]) -> None:
    """Check that a form asks to fit an image of another size by stretching the whole of it.

    The web UI can also crop, pad, or enlarge the masked part alone, all of which come to the same
    if nothing is to fit.

    Args:
        form: The form.
        size: Width and height of its image in pixels.

    Raises:
        ServeError: It asks for another way.
    """
    wanted = form.width or size[0], form.height or size[1]
    if wanted == size:
        return
    fix = f"or an image of {wanted[0]}x{wanted[1]} pixels, not {size[0]}x{size[1]}"
    if form.resize_mode:
        raise cannot("resize_mode", f"send 0, {fix}")
    if form.mask and form.inpaint_full_res:
        raise cannot("inpaint_full_res", f"send false, {fix}")
