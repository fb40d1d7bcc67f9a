"""Names that other programs give to the fields of a request, for suggestions."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from ldm_runtime.errors import RequestError
from ldm_runtime.suggestions import close_names

#: The field that another program's name stands for: of diffusers, stable-diffusion.cpp, OpenVINO
#: GenAI, AUTOMATIC1111's web UI and CompVis' scripts.
ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "text": "prompt",
        "prompts": "prompt",
        "caption": "prompt",
        "negative": "negative_prompt",
        "n_prompt": "negative_prompt",
        "steps": "num_inference_steps",
        "num_steps": "num_inference_steps",
        "n_steps": "num_inference_steps",
        "sampling_steps": "num_inference_steps",
        "ddim_steps": "num_inference_steps",
        "cfg": "guidance_scale",
        "cfg_scale": "guidance_scale",
        "guidance": "guidance_scale",
        "scale": "guidance_scale",
        "unconditional_guidance_scale": "guidance_scale",
        "image_cfg_scale": "image_guidance_scale",
        "img_cfg_scale": "image_guidance_scale",
        "cfg_image": "image_guidance_scale",
        "sampler_name": "sampler",
        "sampling_method": "sampler",
        "sample_method": "sampler",
        "scheduler": "sampler",
        "schedule_type": "schedule",
        "noise_schedule": "schedule",
        "ddim_eta": "eta",
        "timesteps": "sigmas",
        "generator": "seed",
        "rng_seed": "seed",
        "manual_seed": "seed",
        "random_seed": "seed",
        "seeds": "seed",
        "rng": "noise",
        "subseed": "variation_seed",
        "subseed_strength": "variation_strength",
        "n": "num_images",
        "n_samples": "num_images",
        "n_iter": "num_images",
        "batch_count": "num_images",
        "num_images_per_prompt": "num_images",
        "w": "width",
        "h": "height",
        "init_img": "image",
        "init_image": "image",
        "mask": "mask_image",
        "denoising_strength": "strength",
        "hr_scale": "hires_scale",
        "vae_tile_size": "tile_size",
        "crops_coords_top_left": "crop_top_left",
        "refiner_switch_at": "refiner_start",
        "cache_interval": "reuse",
        "label": "class_label",
        "class_labels": "class_label",
        "boxes": "layout",
    }
)

#: What to do instead, for names that no field stands for.
_HINTS: Mapping[str, str] = MappingProxyType(
    {
        "size": "give width and height",
        "output_type": "leave it out: a result has images (PIL) and latents (NumPy)",
        "return_dict": "leave it out: a call returns a Result",
        "prompt_embeds": "give prompt",
        "negative_prompt_embeds": "give negative_prompt",
        "refiner": "give it to Generator(…)",
        "batch_size": "give num_images, or batch_size to Generator(…)",
        "backend": "give it to Generator(…)",
        "device": "give backend to Generator(…)",
        "threads": "give it to Generator(…)",
        "textual_inversion": "give textual_inversions to Generator(…)",
        "textual_inversions": "give it to Generator(…)",
        "adapters": "give it to Generator(…)",
        "lora": "give adapters to Generator(…)",
        "previews": "give it to the generator's call, next to the request",
        "deadline_seconds": "give it to the generator's call, next to the request",
        "on_step": "give it to the generator's call, next to the request",
        "progress": "give it to the generator's call, next to the request",
        "callback": "give on_step to the generator's call",
        "callback_on_step_end": "give on_step to the generator's call",
    }
)


def unknown_field(name: str, fields: Iterable[str]) -> RequestError:
    """Return the error for a field that a request does not have, with what was probably meant."""
    known = list(fields)
    if name in _HINTS:
        return RequestError(name, f"unknown field; {_HINTS[name]}")
    close = [name] if name in ALIASES else close_names(name.lower(), [*known, *ALIASES])
    if meant := dict.fromkeys(ALIASES.get(each, each) for each in close):
        return RequestError(name, f"unknown field (did you mean {' or '.join(meant)}?)")
    return RequestError(name, f"unknown field; a request has {', '.join(known)}")
