"""Settings of AUTOMATIC1111's API: those that a key keeps, and those of one form."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

import msgspec

from ldm_runtime.inputs.reading import shown
from ldm_runtime.pipeline.infotext import WEB_UI_NOISES
from ldm_serve.answers import convert
from ldm_serve.errors import ServeError, invalid
from ldm_serve.executors.messages import ImageFormat

#: Values that name nothing.
NO_NAME = (None, "", "None")


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings that a client can read and change; of each key its own.

    Attributes:
        sd_model_checkpoint: Name of the model; None is the server's default.
        CLIP_stop_at_last_layers: Layer of CLIP that prompts end at, counted from the last, 1.
        randn_source: Random number generator that seeds are for: CPU, GPU or NV.
        samples_format: Format of the images: png, jpg, jpeg or webp.
        sd_vae: The model's own autoencoder.
    """

    sd_model_checkpoint: str | None = None
    CLIP_stop_at_last_layers: Annotated[int, msgspec.Meta(ge=1)] = 1
    randn_source: str = "CPU"
    samples_format: str = "png"
    sd_vae: str | None = None

    def changed(self, changes: Mapping[str, Any]) -> "Options":
        """Return these settings with some of them changed.

        Raises:
            ServeError: A setting is unknown, or its value is none that this server can do.
        """
        for name, value in changes.items():
            if name not in self.__struct_fields__:
                known = ", ".join(self.__struct_fields__)
                raise cannot(name, f"leave it out; the settings here are {known}")
            check_value(name, value, _CHOICES.get(name))
        given = {name: value for name, value in changes.items() if value not in (None, "")}
        return convert(msgspec.structs.asdict(self) | given, Options, strict=True)

    @property
    def image_format(self) -> ImageFormat:
        """The format of the images, as a job names it."""
        return _FORMATS[self.samples_format]


_FORMATS: Mapping[str, ImageFormat] = MappingProxyType(
    {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}
)
#: Values of settings.
_CHOICES: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "randn_source": (None, *WEB_UI_NOISES),
        "samples_format": (None, *_FORMATS),
        "sd_vae": (*NO_NAME, "Automatic"),
    }
)


def check_value(name: str, value: object, values: tuple[object, ...] | None) -> None:
    """Check that a value is one of some; None permits all.

    Raises:
        ServeError: It is another one.
    """
    if values is not None and value not in values:
        known = [msgspec.json.encode(each).decode() for each in values if each is not None]
        raise cannot(name, f"leave it out or send {' or '.join(known)}")


def cannot(name: str, fix: str) -> ServeError:
    """Return the error of a field that asks for what this server cannot do."""
    named = shown(name)
    message = f"{named}: this server cannot do that; {fix}"
    return invalid(named, message, "unsupported_value")
