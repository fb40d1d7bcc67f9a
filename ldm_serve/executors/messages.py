"""Messages between the process that answers HTTP and its workers, as MessagePack.

Nothing is pickled: a message is data of these types, whatever a worker may have become.
"""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from ldm_serve.adapters import AdapterUse

#: Formats of images in answers.
ImageFormat = Literal["png", "jpeg", "webp"]
#: Quality of JPEG and of lossy WebP.
Quality: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=100)]


class Work(msgspec.Struct, frozen=True, kw_only=True, tag="work"):
    """A request to generate; with its seed, it decides every byte of the answer.

    Attributes:
        job: Its identifier.
        model: Name of the model.
        bundle_sha256: Hash of its manifest when the request was checked; None takes whatever is
            there.
        adapters: Adapters that it has.
        fields: Fields of the `GenerationRequest`, images as `data:` URLs; the seed is among them.
        num_images: How many images, for the accounts of the executor.
        previews: Whether steps come with a preview.
        deadline_seconds: Seconds left; None is no limit.
        format: Format of the images.
        quality: Quality of JPEG and of lossy WebP, 0 to 100; None is the runtime's own.
    """

    job: str
    model: str
    fields: dict[str, Any]
    bundle_sha256: str | None = None
    adapters: tuple[AdapterUse, ...] = ()
    num_images: int = 1
    previews: bool = False
    deadline_seconds: float | None = None
    format: ImageFormat = "png"
    quality: Quality | None = None


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """A job to stop."""

    job: str


class Stopped(msgspec.Struct, frozen=True, tag="stopped"):
    """A job that was cancelled is computed no more."""

    job: str


class Quit(msgspec.Struct, frozen=True, tag="quit"):
    """The worker is to end."""


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The worker has opened its first model and takes work.

    Attributes:
        backend: Name of the backend.
        precision: Its precision.
        max_begun: Most images that it begins before others have ended.
    """

    backend: str
    precision: str
    max_begun: int


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """A step of a job is done.

    Attributes:
        job: Its identifier.
        image: Index of the image.
        step: Steps of the image that are done.
        total: Steps of an image.
        preview: Small PNG of the image so far, if asked for.
    """

    job: str
    image: int
    step: int
    total: int
    preview: bytes | None = None


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag="finished"):
    """A job is done.

    Attributes:
        job: Its identifier.
        images: The encoded images.
        seeds: The seed of each.
        metadata: The metadata of each, as its file holds it.
        infotexts: The text of each for AUTOMATIC1111's web UI, if there is one.
        timings: Seconds in each network, and in total.
        calls: Calls of the model's UNet by this worker since the model's last job was done.
        called_images: Images in them, each as often as it was in one.
    """

    job: str
    images: list[bytes]
    seeds: list[int]
    metadata: list[dict[str, Any]]
    infotexts: list[str | None]
    timings: dict[str, float]
    calls: int = 0
    called_images: int = 0


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """A job has ended with an error.

    Attributes:
        job: Its identifier.
        status: HTTP status of the answer.
        code: What happened, for programs.
        message: What happened, in a sentence.
        param: Field that is to blame, if one is.
    """

    job: str
    status: int
    code: str
    message: str
    param: str | None = None


#: What a worker is sent, and what it sends.
Order: TypeAlias = Work | Cancel | Quit
Event: TypeAlias = Progress | Finished | Failed
Report: TypeAlias = Ready | Stopped | Event

_orders: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_reports: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def encode(message: Order | Report) -> bytes:
    """Return the bytes of a message."""
    return msgspec.msgpack.encode(message)


def decode_order(data: bytes) -> Order:
    """Return what a worker is told.

    Raises:
        msgspec.DecodeError: It is not such a message.
    """
    return _orders.decode(data)


def decode_report(data: bytes) -> Report:
    """Return what a worker says.

    Raises:
        msgspec.DecodeError: It is not such a message.
    """
    return _reports.decode(data)
