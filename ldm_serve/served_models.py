"""The models of a server, as far as their manifests say: no network is opened here."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.bundle.manifest import MANIFEST_NAME, load_manifest
from ldm_runtime.errors import RequestError
from ldm_runtime.inputs.layouts import max_objects
from ldm_runtime.inputs.reading import shown
from ldm_runtime.requests.request import FIELDS
from ldm_runtime.samplers import SAMPLERS
from ldm_runtime.schedules import SCHEDULES
from ldm_runtime.specs.micro_conditioning import micro_conditioning_kind
from ldm_runtime.specs.model import ModelSpec, size_step
from ldm_runtime.specs.networks import ClassEmbedderSpec, SegmentationEncoderSpec, TextEncoderSpec
from ldm_runtime.specs.tasks import can_guide, embeds_guidance, task_record
from ldm_runtime.suggestions import did_you_mean
from ldm_serve.adapters import (
    AdapterChoices,
    AdapterUse,
    NamedAdapter,
    alias_of,
    chosen_adapters,
    fitting_adapters,
)
from ldm_serve.errors import ServeError, from_runtime, invalid


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model that requests can name.

    Attributes:
        name: Its name.
        spec: What it is.
        bundle_sha256: Hash of its manifest.
        checkpoint_sha256: Hash of the checkpoint that it was exported from.
        created: When its manifest was written, in seconds since 1970.
        has_previews: Whether steps can have previews.
        adapters: The adapters that fit it, by name.
        uses: Those of them that a request has chosen.
    """

    name: str
    spec: ModelSpec
    bundle_sha256: str
    checkpoint_sha256: str
    created: int
    has_previews: bool
    adapters: Mapping[str, NamedAdapter] = field(default_factory=dict)
    uses: tuple[AdapterUse, ...] = ()

    @property
    def alias(self) -> str:
        """Its name with those of the chosen adapters, as in "engines:style@0.7"."""
        return alias_of(self.name, self.uses)

    @property
    def short_hash(self) -> str:
        """The first digits of the hash of its checkpoint, as many as A1111's web UI shows."""
        return self.checkpoint_sha256[:10]

    def description(self) -> dict[str, Any]:
        """Return what a client needs to know to ask it for images."""
        spec, record = self.spec, task_record(self.spec)
        defaults, takes = spec.defaults, usable_fields(spec)
        return {
            "name": self.name,
            "task": spec.task,
            "family": spec.family,
            "bundle_sha256": self.bundle_sha256,
            "needs": [list(group) for group in record.needs],
            "takes": sorted(takes),
            "image": record.image,
            "size": record.size,
            "enlargement": spec.autoencoder.factor if record.size == "enlarged" else 1,
            "previews": self.has_previews,
            "adapters": [
                {"name": each.name, "sha256": each.sha256} for each in self.adapters.values()
            ],
            "size_step": size_step(spec),
            "labels": list(spec.label_names),
            "classes": _num_classes(spec),
            "max_objects": _max_objects(spec),
            "defaults": {
                "width": defaults.width,
                "height": defaults.height,
                "sampler": defaults.sampler,
                "num_inference_steps": defaults.num_inference_steps,
                "guidance_scale": defaults.guidance_scale,
            },
            "samplers": list(SAMPLERS),
            "schedules": list(SCHEDULES),
            "fields": {name: FIELDS[name].text for name in FIELDS if name in takes},
        }


def usable_fields(spec: ModelSpec) -> frozenset[str]:
    """Return the fields that requests to a model can use.

    They are those of its task, without what only other models of the task have: guidance, the
    numbers of SDXL, a shallow UNet, a second decoder. A server opens no refiner.
    """
    unusable = {"refiner_start"}
    if not can_guide(spec):
        unusable |= {"negative_prompt", "guidance_rescale", "guidance_interval"}
        unusable |= set() if embeds_guidance(spec) else {"guidance_scale"}
    kind = micro_conditioning_kind(spec)
    if kind is None:
        unusable |= {"original_size", "crop_top_left"}
    if kind != "target size":
        unusable.add("target_size")
    if kind != "aesthetic score":
        unusable |= {"aesthetic_score", "negative_aesthetic_score"}
    if spec.unet is None or spec.unet.shallow_blocks is None:
        unusable.add("reuse")
    if len(spec.decoders) == 1:
        unusable.add("decoder")
    return task_record(spec).takes - unusable


def _num_classes(spec: ModelSpec) -> int | None:
    """Return how many classes a request can name, of images or of pixels; None if there are none.

    The null class is not one of them.
    """
    embedder, maps = spec.find(ClassEmbedderSpec), spec.find(SegmentationEncoderSpec)
    if embedder is not None:
        return embedder.num_classes - (embedder.null_class is not None)
    return None if maps is None else maps.num_classes


def _max_objects(spec: ModelSpec) -> int | None:
    """Return how many objects a layout may have; None if a model takes no layouts."""
    if "layout" not in task_record(spec).takes:
        return None
    return max_objects(spec.network(TextEncoderSpec))


class ServedModels(Mapping[str, ServedModel]):
    """All models of a server by name; the first is the default.

    Args:
        bundles: Folder of every model.
        adapters: Files of the adapters, by name.
        live_adapters: Whether they are to be inputs of the networks.

    Raises:
        BundleError: A folder is not a bundle.
        RequestError: An adapter cannot be read, or fits no model.
    """

    def __init__(
        self,
        bundles: Mapping[str, Path],
        adapters: Mapping[str, Path] = MappingProxyType({}),
        *,
        live_adapters: bool = False,
    ) -> None:
        fitting = fitting_adapters(adapters, bundles, live=live_adapters)
        models = {
            name: replace(_served(name, folder), adapters=fitting[name])
            for name, folder in bundles.items()
        }
        self._models = MappingProxyType(models)

    def __getitem__(self, name: str) -> ServedModel:
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def find(self, name: str | None, adapters: AdapterChoices | None = None) -> ServedModel:
        """Return the model of that name, or the default for None, with the chosen adapters.

        Args:
            name: Its name, after which adapters may stand, as in "engines:style@0.7+other@0.3".
            adapters: Adapters, which the name has none of then.

        Raises:
            ServeError: There is none, or an adapter is not as it should be.
        """
        if name is None or name in self:
            model = next(iter(self.values())) if name is None else self[name]
            return model if adapters is None else _with_adapters(model, adapters, "adapters")
        base, _, text = name.rpartition(":")
        model = self._named(base if base in self else name)
        if adapters is not None:
            raise invalid(
                "adapters", f"adapters: {shown(name)!r} names some already; leave one out"
            )
        return _with_adapters(model, text, "model")

    def _named(self, name: str) -> ServedModel:
        if name not in self:
            names, shortened = ", ".join(self), shown(name)
            hint = did_you_mean(shortened, self)
            message = f"there is no model {shortened!r}{hint}; this server has {names}"
            raise ServeError(404, "model_not_found", message, param="model")
        return self[name]


def _with_adapters(model: ServedModel, choices: AdapterChoices, field: str) -> ServedModel:
    try:
        return replace(model, uses=chosen_adapters(choices, model.adapters, field))
    except RequestError as error:
        raise from_runtime(error) from error


def _served(name: str, folder: Path) -> ServedModel:
    manifest = load_manifest(folder)
    path = folder / MANIFEST_NAME
    return ServedModel(
        name=name,
        spec=manifest.spec,
        bundle_sha256=sha256_of(path),
        checkpoint_sha256=manifest.build.checkpoint_sha256,
        created=int(path.stat().st_mtime),
        has_previews=manifest.preview is not None,
    )
