"""The text in which AUTOMATIC1111's web UI says how an image was made, written and read.

A prompt, a line "Negative prompt: …", and a line of names and values, such as
"Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x512, Model hash: 45dee52b".
A value with a comma, a colon or a line break is quoted as in JSON. Galleries and other programs
read it as well. The format has no escape for a prompt whose own lines look like the last two.

Source: AUTOMATIC1111/stable-diffusion-webui 1.10, `create_infotext` in `modules/processing.py`,
`quote` and `parse_generation_parameters` in `modules/infotext_utils.py`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ldm_runtime.adapters.tags import AdapterTag, tags_of, without_tags
from ldm_runtime.requests.resolved import (
    MaskedImage,
    NoImage,
    NoReuse,
    PromptCondition,
    Refiner,
    ResolvedRequest,
)
from ldm_runtime.requests.sampler_names import (
    WEB_UI_SCHEDULES,
    automatic_schedule,
    known_sampler,
    known_schedule,
    web_ui_sampler,
)
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import SCHEDULES
from ldm_runtime.specs.tasks import TASKS

#: Most characters that are read: `read_infotext` looks at text from strangers.
MAX_CHARACTERS = 100_000

#: The web UI's random generators; without a name it takes the GPU's.
WEB_UI_NOISES: Mapping[str, str] = MappingProxyType(
    {"CPU": "torch-cpu", "GPU": "torch-cuda", "NV": "torch-cuda"}
)
_SCHEDULE, _AUTOMATIC = "Schedule type", "Automatic"
#: Schedules of the web UI that are others than those of the same name here.
_OTHER_SCHEDULES = frozenset({"Beta"})
_NEGATIVE = "Negative prompt:"
_LEAST_PARAMETERS = 3
_JSON = json.JSONDecoder()
_SIZE = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True, kw_only=True)
class InfotextParts:
    """The parts of such a text, as they stand there.

    Attributes:
        prompt: The prompt.
        negative_prompt: The negative prompt; empty without one.
        values: The names and values of the last line.
    """

    prompt: str
    negative_prompt: str
    values: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Infotext:
    """The contents of such a text.

    Attributes:
        request: The fields of a request that it gives, checked no further.
        adapters: The adapters that its prompt names, which stand in the prompt no more.
        others: The names and values that no field stands for.
    """

    request: Mapping[str, Any]
    adapters: tuple[AdapterTag, ...]
    others: Mapping[str, str]


#: Suffixes of checkpoint files; what follows a dot in the name of a folder is a part of its name.
_SUFFIXES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")


def model_name(checkpoint: str) -> str:
    """Return the name of a model by that of its checkpoint, a file or a folder."""
    return next(
        (checkpoint.removesuffix(each) for each in _SUFFIXES if checkpoint.endswith(each)),
        checkpoint,
    )


@dataclass(frozen=True, kw_only=True)
class InfotextModel:
    """A model, as such a text names it.

    Attributes:
        name: Its name, see `model_name`.
        sha256: Hash of its checkpoint, whose beginning is the web UI's "Model hash".
    """

    name: str
    sha256: str

    @property
    def plain_name(self) -> str:
        """The name without the signs that end a value, which the web UI leaves out."""
        return self.name.replace(",", "").replace(":", "")

    @property
    def short_hash(self) -> str:
        """The first ten digits of the hash."""
        return self.sha256[:10]


@dataclass(frozen=True, kw_only=True)
class InfotextAdapter:
    """An adapter, as such a text names it.

    Attributes:
        name: Its name.
        scale: Factor of its updates.
        sha256: The hash whose beginning the web UI and galleries know it by, see `AdapterFile`.
    """

    name: str
    scale: float
    sha256: str

    @property
    def tag(self) -> AdapterTag:
        """What the prompt has of it, in whose name no sign ends the tag."""
        name = self.name.replace(":", "").replace(">", "")
        return AdapterTag(name=name, scale=self.scale)

    @property
    def shown_hash(self) -> str:
        """Its name and the first twelve digits of the hash, without the signs that end either."""
        return f"{self.tag.name.replace(',', '')}: {self.sha256[:12]}"


def write_infotext(
    request: ResolvedRequest,
    *,
    model: InfotextModel,
    refiner: InfotextModel | None,
    version: str,
    textual_inversions: Mapping[str, str] = MappingProxyType({}),
    adapters: Sequence[InfotextAdapter] = (),
) -> str | None:
    """Return the text for the one image of a request, or None if the request has no prompt.

    Args:
        request: The request.
        model: The model.
        refiner: The model that made the last steps, if one did.
        version: This program's.
        textual_inversions: Hash of the file of every learned word, by word.
        adapters: The adapters of the model, which the prompt names at its end.
    """
    condition = request.condition
    if not isinstance(condition, PromptCondition):
        return None
    values = {
        "Steps": request.num_inference_steps,
        "Sampler": web_ui_sampler(request.sampler),
        _SCHEDULE: WEB_UI_SCHEDULES.get(request.schedule),
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}",
        "Model hash": model.short_hash,
        "Model": model.plain_name,
        **_optional_values(request),
        "Mask blur": _mask_blur(request),
        **_refiner_values(request, refiner),
        "Clip skip": condition.clip_skip + 1 if condition.clip_skip else None,
        "TI hashes": ", ".join(f"{word}: {sha[:12]}" for word, sha in textual_inversions.items())
        or None,
        "Lora hashes": ", ".join(each.shown_hash for each in adapters) or None,
        "Version": f"ldm-deploy {version}",
    }
    prompt = "".join([condition.prompt, *(f" {each.tag}" for each in adapters)]).strip()
    negative = f"\n{_NEGATIVE} {condition.negative_prompt}" if condition.negative_prompt else ""
    listed = ", ".join(
        f"{name}: {_quoted(str(value))}" for name, value in values.items() if value is not None
    )
    return f"{prompt}{negative}\n{listed}".strip().replace("\0", " ")


def infotext_parts(text: str) -> InfotextParts | None:
    """Return the parts of a text of the web UI, or None if it is not one."""
    if len(text) > MAX_CHARACTERS:
        return None
    *lines, last = text.strip().split("\n")
    values = _parameters(last)
    if len(values) < _LEAST_PARAMETERS or "Steps" not in values:
        return None
    prompt, negative = _prompts(lines)
    return InfotextParts(prompt=prompt, negative_prompt=negative, values=values)


def read_infotext(text: str) -> Infotext | None:
    """Return the contents of a text of the web UI, or None if it is not one.

    The fields are not checked: `request.parse_request` does that.
    """
    parts = infotext_parts(text)
    if parts is None:
        return None
    prompt, adapters = _without_adapters(parts.prompt)
    request: dict[str, Any] = {"prompt": prompt}
    if parts.negative_prompt:
        request["negative_prompt"] = parts.negative_prompt
    parameters = parts.values
    others = {name: value for name, value in parameters.items() if not _take(request, name, value)}
    if others.get(_SCHEDULE) == _AUTOMATIC and (schedule := _automatic(request)):
        request["schedule"] = schedule
        del others[_SCHEDULE]
    if "RNG" not in parameters:
        request["noise"] = WEB_UI_NOISES["GPU"]
    if "hires_scale" in request and "strength" in request:
        request["hires_strength"] = request.pop("strength")
    for name, field in _without_effect(request, others).items():
        del request[field]
        others[name] = parameters[name]
    return Infotext(request=request, adapters=adapters, others=others)


def _without_adapters(prompt: str) -> tuple[str, tuple[AdapterTag, ...]]:
    """Return a prompt without the names of adapters, and these; as it is if one is not understood.

    What stays, the reader of prompts warns of.
    """
    try:
        adapters = tuple(tags_of(prompt))
    except ValueError:
        return prompt, ()
    return without_tags(prompt).strip(), adapters


def _without_effect(request: Mapping[str, Any], others: Mapping[str, str]) -> dict[str, str]:
    """Return the names and fields of values that a request here would refuse."""
    found = {}
    sampler = request.get("sampler")
    if "eta" in request and sampler is not None and not SAMPLERS[sampler].uses_eta:
        found["Eta"] = "eta"
    # Of a second pass whose size is given in pixels.
    if "strength" in request and any(name.startswith("Hires") for name in others):
        found["Denoising strength"] = "strength"
    return found


def _optional_values(request: ResolvedRequest) -> dict[str, object]:
    """Return the values that the web UI leaves out where they are its defaults."""
    values: dict[str, object] = {}
    task = TASKS[request.task]
    if request.is_variation:
        values["Variation seed"] = request.variation_seed
        values["Variation seed strength"] = f"{request.variation_strength:g}"
    if len(request.passes) > 1:
        values["Denoising strength"] = f"{request.passes[-1].strength:g}"
        values["Hires upscale"] = f"{request.passes[-1].scale:g}"
    elif not isinstance(request.source_image, NoImage) and task.image == "start":
        values["Denoising strength"] = f"{request.passes[0].strength:g}"
    if task.guides_by_image:
        values["Image CFG scale"] = f"{request.image_guidance_scale:g}"
    if SAMPLERS[request.sampler].uses_eta:
        values["Eta"] = f"{request.eta:g}"
    labels = {name: label for label, name in WEB_UI_NOISES.items() if label != "NV"}
    if request.noise != WEB_UI_NOISES["GPU"]:
        values["RNG"] = labels.get(request.noise, request.noise)
    if not isinstance(request.reuse, NoReuse):
        values["Feature reuse"] = request.reuse.rule
    return values


def _mask_blur(request: ResolvedRequest) -> int | None:
    """Return the blur of the mask, if there is one and the web UI has a number for it."""
    if not isinstance(request.source_image, MaskedImage):
        return None
    width, height = request.source_image.blur
    return width if width == height and width else None


def _refiner_values(request: ResolvedRequest, refiner: InfotextModel | None) -> dict[str, object]:
    if refiner is None or not isinstance(request.refiner, Refiner):
        return {}
    return {
        "Refiner": f"{refiner.plain_name} [{refiner.short_hash}]",
        "Refiner switch at": f"{request.refiner.start:g}",
    }


def _parameters(line: str) -> dict[str, str]:
    """Return the names and values of a line, which are separated by commas."""
    found = {}
    start = 0
    while (colon := line.find(":", start)) >= 0:
        name = line[start:colon].rpartition(",")[2].strip()
        value, start = _value_at(line, colon + 1)
        found[name] = value
    return found


def _value_at(line: str, start: int) -> tuple[str, int]:
    """Return the value that begins at a place in a line, and where the next name begins."""
    while line.startswith(" ", start):
        start += 1
    if line.startswith('"', start):
        try:
            value, end = _JSON.raw_decode(line, start)
        except ValueError:
            end = start  # a quotation mark that quotes nothing
        if end > start and line[end : end + 1] in ("", ","):
            return str(value), end
    comma = line.find(",", start)
    end = len(line) if comma < 0 else comma
    return line[start:end].strip(), end


def _prompts(lines: list[str]) -> tuple[str, str]:
    """Split the lines above the last one into the prompt and the negative prompt."""
    stripped = [line.strip() for line in lines]
    starts = [index for index, line in enumerate(stripped) if line.startswith(_NEGATIVE)]
    end = starts[0] if starts else len(stripped)
    negative = [line.removeprefix(_NEGATIVE).strip() for line in stripped[end:]]
    return "\n".join(stripped[:end]), "\n".join(negative)


def _take(request: dict[str, Any], name: str, value: str) -> bool:
    """Put a value into the field that it is for; return False if there is none, or it is no value.

    The field of a schedule wins over the schedule in a sampler's name.
    """
    try:
        fields = _READERS[name](value)
    except (KeyError, ValueError):
        return False
    if name == "Sampler":
        fields = {**fields, **request}
    request.update(fields)
    return True


def _read_sampler(value: str) -> dict[str, Any]:
    sampler, schedule = known_sampler(value)
    if sampler not in SAMPLERS:
        raise ValueError(f"{value!r} is not a sampler here")
    return {"sampler": sampler} | ({"schedule": schedule} if schedule else {})


def _read_schedule(value: str) -> dict[str, Any]:
    schedule = known_schedule(value)
    if schedule not in SCHEDULES or value in _OTHER_SCHEDULES:
        raise ValueError(f"{value!r} is not a schedule here")
    return {"schedule": schedule}


def _automatic(request: Mapping[str, Any]) -> str | None:
    """Return the schedule that the web UI gives a sampler, unless its name carries one."""
    carried: str | None = request.get("schedule")
    return carried or automatic_schedule(request.get("sampler", ""))


def _read_size(value: str) -> dict[str, Any]:
    found = _SIZE.fullmatch(value)
    if found is None:
        raise ValueError(f"{value!r} is not a size")
    return {"width": int(found[1]), "height": int(found[2])}


def _whole(field: str) -> Callable[[str], dict[str, Any]]:
    return lambda value: {field: int(value)}


def _number(field: str) -> Callable[[str], dict[str, Any]]:
    return lambda value: {field: float(value)}


#: From the name of a value to the fields of a request that it gives.
_READERS: Mapping[str, Callable[[str], dict[str, Any]]] = MappingProxyType(
    {
        "Steps": _whole("num_inference_steps"),
        "Sampler": _read_sampler,
        _SCHEDULE: _read_schedule,
        "CFG scale": _number("guidance_scale"),
        "Image CFG scale": _number("image_guidance_scale"),
        "Seed": _whole("seed"),
        "Size": _read_size,
        "Variation seed": _whole("variation_seed"),
        "Variation seed strength": _number("variation_strength"),
        "Denoising strength": _number("strength"),
        "Eta": _number("eta"),
        "Clip skip": lambda value: {"clip_skip": max(int(value) - 1, 0)},
        "RNG": lambda value: {"noise": WEB_UI_NOISES[value]},
        "Hires upscale": _number("hires_scale"),
        "Feature reuse": lambda value: {"reuse": value},
    }
)


def _quoted(value: str) -> str:
    if not any(each in value for each in ",\n:"):
        return value
    return json.dumps(value, ensure_ascii=False)
