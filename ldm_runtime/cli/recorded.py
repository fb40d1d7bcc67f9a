"""The request that an image's metadata records, to repeat it with some fields changed."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldm_runtime.adapters.files import adapter_sha256
from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.bundle.manifest import MANIFEST_NAME, load_manifest
from ldm_runtime.errors import LdmError
from ldm_runtime.pipeline.image_files import read_metadata
from ldm_runtime.pipeline.infotext import model_name
from ldm_runtime.requests.replaced_fields import REPLACED, kept_fields
from ldm_runtime.requests.request import parse_request
from ldm_runtime.requests.request_json import request_to_json
from ldm_runtime.requests.sampler_names import with_known_names
from ldm_runtime.specs.networks import TextEncoderSpec

_LOGGER = logging.getLogger(__name__)


def recorded_fields(
    path: Path,
    changes: Mapping[str, object],
    bundle: Path,
    inversions: Mapping[str, Path],
    adapters: Mapping[Path, float],
    refiner: Path | None = None,
) -> dict[str, object]:
    """Return the fields of the request that made an image, changed.

    A recorded field that depends on a changed one is left out, see `replaced_fields`, and so is
    `clip_skip` of an image of the web UI for models for which that ignores it. Another bundle than
    the one that made the image, and other textual inversions or adapters, are warned of.

    Args:
        path: The image.
        changes: The fields to change.
        bundle: The bundle that is to generate it again.
        inversions: Files of the textual inversions that are to be used, by word.
        adapters: Scales of the adapters that are to be used, by file.
        refiner: The bundle that is to make its last steps, if one is.

    Raises:
        RequestError: A changed field is of the wrong type or out of range.
        LdmError: The image does not say how it was made.
    """
    metadata = read_metadata(path)
    request = metadata.get("request")
    if not isinstance(request, dict):
        raise LdmError(f"{path}: its metadata has no request; `ldm generate` did not make it")
    if request.get("clip_skip") and _comes_from_web_ui(metadata) and _skips_none_there(bundle):
        others = {**metadata["others"], "Clip skip": request["clip_skip"]}
        request, metadata = {**request, "clip_skip": None}, {**metadata, "others": others}
    _compare_bundles(path, metadata, bundle)
    if refiner is not None:
        _compare_refiners(path, metadata, refiner)
    _compare_inversions(path, metadata, inversions)
    _compare_adapters(path, metadata, adapters)
    known = with_known_names(changes)
    names = known.keys() & REPLACED.keys()
    read = parse_request({name: known[name] for name in names})
    described = request_to_json(read)
    kept = kept_fields(request, {name: described[name] for name in names})
    return kept | known | {name: getattr(read, name) for name in names}


def _comes_from_web_ui(metadata: Mapping[str, Any]) -> bool:
    """Return whether an image has the web UI's text alone, not written here."""
    others = metadata.get("others")
    if "bundle_sha256" in metadata or not isinstance(others, dict):
        return False
    return not str(others.get("Version")).startswith("ldm-deploy")


def _skips_none_there(bundle: Path) -> bool:
    """Return whether the web UI skips no layers of a model: it has a text encoder of OpenCLIP.

    So have Stable Diffusion 2 and SDXL, whose other text encoder skips layers only if a setting
    says so that the text does not have.

    Source: AUTOMATIC1111/stable-diffusion-webui 1.10, `encode_with_transformers` in
    `modules/sd_hijack_clip.py` and `modules/sd_hijack_open_clip.py`.
    """
    networks = load_manifest(bundle).spec.networks.values()
    return any(isinstance(each, TextEncoderSpec) and each.kind == "openclip" for each in networks)


def _compare_bundles(path: Path, metadata: Mapping[str, Any], bundle: Path) -> None:
    made_by, used = metadata.get("bundle_sha256"), sha256_of(bundle / MANIFEST_NAME)
    if made_by is None:
        others = ", ".join(metadata.get("others", ())) or "none"
        _LOGGER.warning(
            "%s was made by another program; the image will differ. Settings not repeated: %s",
            *(path, others),
        )
    elif made_by != used:
        _LOGGER.warning(
            "%s was generated from another bundle (%.12s) than %s (%.12s); the image will differ",
            *(path, made_by, bundle, used),
        )


def _compare_refiners(path: Path, metadata: Mapping[str, Any], refiner: Path) -> None:
    made_by, used = metadata.get("refiner_sha256"), sha256_of(refiner / MANIFEST_NAME)
    if made_by != used:
        what = "no refiner" if made_by is None else f"another refiner ({made_by:.12})"
        _LOGGER.warning(
            "%s was generated with %s, and not with %s (%.12s); the image will differ",
            *(path, what, refiner, used),
        )


def _compare_inversions(
    path: Path, metadata: Mapping[str, Any], inversions: Mapping[str, Path]
) -> None:
    recorded = metadata.get("textual_inversions")
    for word, sha256 in recorded.items() if isinstance(recorded, dict) else ():
        file = inversions.get(word)
        if file is None or sha256_of(file) != sha256:
            _LOGGER.warning(
                "%s was generated with a textual inversion %r (%.12s) that is not given here; the "
                "image will differ. --textual-inversion gives it",
                *(path, word, sha256),
            )


def _compare_adapters(
    path: Path, metadata: Mapping[str, Any], adapters: Mapping[Path, float]
) -> None:
    recorded = metadata.get("adapters")
    used = set()
    for file, scale in adapters.items():
        used.add((model_name(file.name), scale))  # all that another program records of it
        with suppress(OSError, ValueError):  # which the generator will tell of
            used.add((adapter_sha256(file), scale))
    for adapter in recorded if isinstance(recorded, list) else ():
        if not isinstance(adapter, dict):
            continue
        name, sha256, factor = (adapter.get(key) for key in ("name", "sha256", "scale"))
        if (name if sha256 is None else sha256, factor) in used:
            continue
        shown = str(name) if sha256 is None else f"{name} ({sha256!s:.12})"
        _LOGGER.warning(
            "%s was generated with the adapter %s at a scale of %s, which is not given here; the "
            "image will differ. --adapter %s@%s gives it",
            *(path, shown, factor, name, factor),
        )
