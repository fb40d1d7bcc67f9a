"""Image files that say how they were made: PNG, JPEG and WebP.

Metadata is JSON: a text chunk `ldm-deploy` of a PNG, the property `ldm:metadata` of XMP elsewhere.
Next to it stands the text of AUTOMATIC1111's web UI (`infotext`), where galleries look for it: in
the text chunk `parameters`, or in the EXIF user comment.
"""

import html
import io
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Literal, NamedTuple
from warnings import catch_warnings

import msgspec
from PIL import ExifTags, Image, PngImagePlugin

from ldm_runtime.durable import whole_file
from ldm_runtime.errors import LdmError, RequestError
from ldm_runtime.inputs.reading import DAMAGE
from ldm_runtime.pipeline.file_names import image_format
from ldm_runtime.pipeline.infotext import read_infotext

#: Keyword of the PNG text chunk that holds the metadata, as JSON.
METADATA_KEY = "ldm-deploy"
INFOTEXT_KEY = "parameters"
#: Quality of JPEG files, of 100. PNG and WebP files keep every pixel.
JPEG_QUALITY = 95

#: Formats of image files, as they are called in APIs.
FormatName = Literal["png", "jpeg", "webp"]

_MAX_DEPTH = 50  # of metadata; that of a request has 4
_COMMENT_PREFIX = b"UNICODE\0"
# Types of EXIF values; offset of the first directory from the byte order, and length of each.
_LONG, _UNDEFINED = 4, 7
_IFD_OFFSET, _IFD_BYTES = 8, 18
_XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:ldm="https://github.com/ldm-deploy/ldm-deploy#" '
    'ldm:metadata="{}"/></rdf:RDF></x:xmpmeta>'
)
_XMP_METADATA = re.compile(rb'ldm:metadata="([^"]*)"')
# Errors that damaged EXIF data was seen to raise in Pillow, in addition to those of any file.
_DAMAGE = (*DAMAGE, AttributeError, KeyError, TypeError, IndexError, OverflowError)


def save_image(
    image: Image.Image,
    path: Path,
    metadata: Mapping[str, Any],
    infotext: str | None = None,
    *,
    replace: bool = False,
) -> None:
    """Write an image and its metadata; the file appears complete or not at all.

    Args:
        image: The image.
        path: The file, whose suffix says its format.
        metadata: The metadata, as `read_metadata` returns it.
        infotext: Text for other programs.
        replace: Whether to replace an existing file.

    Raises:
        RequestError: The suffix is not that of a format that is written, or the metadata does not
            fit into such a file.
        FileExistsError: There is a file at `path`, and `replace` is off.
        OSError: The folder cannot be written to.
    """
    name = image_format(path)
    with whole_file(path, replace=replace) as file:
        try:
            _WRITERS[name](image, file, msgspec.json.encode(metadata).decode(), infotext)
        except ValueError as error:  # of JPEG, whose segments have 64 KiB at most
            raise RequestError(
                "path", f"{path}: the metadata does not fit into {name} ({error}); save it as .png"
            ) from error


def encode_image_file(
    image: Image.Image,
    name: FormatName,
    metadata: Mapping[str, Any],
    infotext: str | None = None,
    *,
    quality: int | None = None,
) -> bytes:
    """Return the bytes of an image file with its metadata.

    Args:
        image: The image.
        name: Its format.
        metadata: The metadata, as `read_metadata` returns it.
        infotext: Text for other programs.
        quality: Quality of a JPEG, or of a WebP that is not lossless then, from 0 to 100; None is
            that of `save_image`.

    Raises:
        RequestError: The metadata does not fit into a file of that format.
    """
    file = io.BytesIO()
    text = msgspec.json.encode(metadata).decode()
    try:
        if name == "png":
            _write_png(image, file, text, infotext)
        elif name == "jpeg":
            _write_jpeg(image, file, text, infotext, quality=quality)
        else:
            _write_webp(image, file, text, infotext, quality=quality)
    except ValueError as error:
        raise RequestError(
            "output_format", f"the metadata does not fit into {name} ({error}); ask for png"
        ) from error
    return file.getvalue()


class ImageTexts(NamedTuple):
    """The texts of an image file.

    Attributes:
        metadata: The metadata as JSON; None if it has none.
        infotext: The text for AUTOMATIC1111's web UI; None if it has none.
    """

    metadata: str | None
    infotext: str | None


def read_texts(file: Path | BinaryIO, name: str) -> ImageTexts:
    """Return the texts of an image file, without decoding a pixel.

    Args:
        file: Its path, or the file.
        name: Its name in error messages.

    Raises:
        LdmError: The file is not an image of a known format.
    """
    try:
        # Pillow warns of damaged EXIF data, which then has no text.
        with catch_warnings(action="ignore"), Image.open(file, formats=list(_WRITERS)) as image:
            return _texts(image)
    except (*_DAMAGE, Image.DecompressionBombError) as error:
        raise LdmError(f"{name} cannot be read as PNG, JPEG or WebP: {error}") from error


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of an image file, without decoding a pixel.

    It is what `save_image` wrote. Of a file of AUTOMATIC1111's web UI it is the fields of a
    "request", the names and scales of its "adapters", and the "others" that no field stands for.

    Raises:
        LdmError: The file is not an image of a known format, or has no such metadata.
    """
    texts = read_texts(path, str(path))
    metadata, infotext = texts.metadata, texts.infotext
    if metadata is not None:
        return _decoded(metadata, path)
    if infotext is not None and (read := read_infotext(infotext)) is not None:
        return {
            "request": dict(read.request),
            "adapters": [asdict(each) for each in read.adapters],
            "others": dict(read.others),
        }
    raise LdmError(
        f"{path} carries no {METADATA_KEY!r} metadata, nor {INFOTEXT_KEY!r} of AUTOMATIC1111's "
        "web UI; `ldm generate` did not make it"
    )


def _decoded(metadata: str, path: Path) -> dict[str, Any]:
    try:
        decoded = msgspec.json.decode(metadata, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise LdmError(f"{path}: its {METADATA_KEY!r} metadata is damaged: {error}") from error
    level: list[Any] = [decoded]
    for _ in range(_MAX_DEPTH):
        level = [inner for each in level for inner in _inner(each)]
    if level:
        raise LdmError(f"{path}: its {METADATA_KEY!r} metadata nests more than {_MAX_DEPTH} deep")
    return decoded


def _inner(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _write_png(image: Image.Image, file: BinaryIO, metadata: str, infotext: str | None) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_itxt(METADATA_KEY, metadata)
    if infotext is not None:
        text.add_text(INFOTEXT_KEY, infotext)
    image.save(file, format="PNG", pnginfo=text)


def _write_jpeg(
    image: Image.Image,
    file: BinaryIO,
    metadata: str,
    infotext: str | None,
    *,
    quality: int | None = None,
) -> None:
    texts = {"exif": _exif(infotext), "xmp": _xmp(metadata)}
    quality = JPEG_QUALITY if quality is None else quality
    # Colours at full resolution: the edges of flat shapes would bleed otherwise.
    image.save(file, format="JPEG", quality=quality, subsampling="4:4:4", **texts)


def _write_webp(
    image: Image.Image,
    file: BinaryIO,
    metadata: str,
    infotext: str | None,
    *,
    quality: int | None = None,
) -> None:
    kind: dict[str, Any] = {"lossless": True} if quality is None else {"quality": quality}
    image.save(file, format="WEBP", exif=_exif(infotext), xmp=_xmp(metadata), **kind)


#: Writer of every format.
_WRITERS: Mapping[str, Callable[[Image.Image, BinaryIO, str, str | None], None]] = MappingProxyType(
    {"PNG": _write_png, "JPEG": _write_jpeg, "WEBP": _write_webp}
)


def _exif(infotext: str | None) -> bytes:
    """Return EXIF data with a text as its user comment; nothing without a text.

    Built here, because Pillow writes the comment as the type BYTE, and piexif, which the web UI
    reads it with, takes UNDEFINED alone. Source: Exif 2.3, sections 4.5 and 4.6.
    """
    if infotext is None:
        return b""
    comment = _COMMENT_PREFIX + infotext.encode("utf-16-be")
    first = _ifd(ExifTags.IFD.Exif, _LONG, 1, _IFD_OFFSET + _IFD_BYTES)
    second = _ifd(ExifTags.Base.UserComment, _UNDEFINED, len(comment), _IFD_OFFSET + 2 * _IFD_BYTES)
    return b"Exif\0\0MM\0*" + struct.pack(">I", _IFD_OFFSET) + first + second + comment


def _ifd(tag: int, kind: int, count: int, value: int) -> bytes:
    """Return a directory of one entry, which no other follows."""
    return struct.pack(">HHHIII", 1, tag, kind, count, value, 0)


def _xmp(metadata: str) -> bytes:
    return _XMP.format(html.escape(metadata)).encode()


def _texts(image: Image.Image) -> ImageTexts:
    """Return the texts of an opened image."""
    if isinstance(image, PngImagePlugin.PngImageFile):
        # Not `image.text`, which decodes the pixels to look for text behind them.
        found = image.info.get(METADATA_KEY), image.info.get(INFOTEXT_KEY)
        metadata, infotext = (str(each) if isinstance(each, str) else None for each in found)
        return ImageTexts(metadata, infotext)
    xmp = image.info.get("xmp")
    attribute = _XMP_METADATA.search(xmp) if isinstance(xmp, bytes) else None
    metadata = None if attribute is None else html.unescape(attribute[1].decode(errors="replace"))
    return ImageTexts(metadata, _user_comment(image))


def _user_comment(image: Image.Image) -> str | None:
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if not isinstance(comment, bytes) or not comment.startswith(_COMMENT_PREFIX):
        return None
    return comment.removeprefix(_COMMENT_PREFIX).decode("utf-16-be", errors="replace")
