"""The subject of a measurement: a bundle, and a request that every task of bundles can have."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ldm_runtime.benchmark.work import Work, network_work
from ldm_runtime.bundle.files import checked_file
from ldm_runtime.bundle.manifest import Manifest, load_manifest
from ldm_runtime.diagnostics.golden_requests import (
    ATTACHMENTS,
    REQUEST_FILE,
    load_golden_request,
)
from ldm_runtime.errors import BundleError
from ldm_runtime.requests.request import parse_request
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.requests.resolved import ResolvedRequest

PROMPT = "a large red circle left of a small blue square on a white background"
#: The fields that a bundle of another task takes from its first golden request.
_CONDITIONS = (
    *("prompt", "class_label", "layout", "segmentation", "embeddings", "depth_map"),
    *("image", "mask_image", "outpaint"),
)
_DEFAULTS: Mapping[str, object] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The subject of a measurement: one request to one bundle.

    Attributes:
        bundle: The bundle's folder.
        manifest: Its manifest.
        request: The request; its images are one batch.
        fields: The fields that were asked for.
        trust_engines: Whether TensorRT may run engines that were not built on this machine.
    """

    bundle: Path
    manifest: Manifest
    request: ResolvedRequest
    fields: Mapping[str, object]
    trust_engines: bool

    @property
    def rows(self) -> int:
        """Rows in a call of the UNet."""
        return self.request.num_images * len(self.request.guidance.samples)

    @property
    def work(self) -> Mapping[str, Work]:
        """Work of one call of each network."""
        factor = self.manifest.spec.autoencoder.factor
        height, width = self.request.height // factor, self.request.width // factor
        return network_work(self.manifest.spec, height, width, self.request.num_images, self.rows)

    @property
    def settings(self) -> dict[str, str | int | float]:
        """Settings stored with every row."""
        names = ("height", "width", "num_inference_steps", "guidance_scale", "sampler", "schedule")
        return {name: getattr(self.request, name) for name in names} | {
            "batch": self.request.num_images,
            "unet_rows": self.rows,
            "weights_dtype": self.manifest.weights_dtype,
        }


def open_subject(
    bundle: Path,
    fields: Mapping[str, Any] = _DEFAULTS,
    *,
    sha256: str | None = None,
    trust_engines: bool = False,
) -> Subject:
    """Return a bundle with a request of its own task and the defaults of its model.

    Args:
        bundle: The bundle's folder.
        fields: Further fields of the request; None stands for the default.
        sha256: Hash that the bundle's manifest must have; None is any.
        trust_engines: Whether TensorRT may run engines that were not built on this machine.

    Raises:
        LdmError: There is no such bundle, or its model cannot do what the fields ask for.
    """
    manifest = load_manifest(bundle, sha256=sha256)
    given = {name: value for name, value in fields.items() if value is not None}
    request = parse_request({**_condition(bundle, manifest), **given, "seed": 0})
    return Subject(
        bundle=bundle,
        manifest=manifest,
        request=resolve(request, manifest.spec),
        fields=given,
        trust_engines=trust_engines,
    )


def _condition(bundle: Path, manifest: Manifest) -> dict[str, object]:
    """Return what the images are generated from: a prompt, or the golden request's condition."""
    if manifest.spec.task == "text-to-image":
        return {"prompt": PROMPT}
    if not manifest.golden:
        raise BundleError(f"{bundle} has no golden request to measure; export it again")
    folder = manifest.golden[0]
    request = load_golden_request(checked_file(bundle, manifest, f"{folder}/{REQUEST_FILE}").parent)
    for name, file in ATTACHMENTS.items():
        if getattr(request, name) is not None:
            checked_file(bundle, manifest, f"{folder}/{file}")
    found = {name: getattr(request, name) for name in _CONDITIONS}
    return {name: value for name, value in found.items() if value is not None}
