"""An open model: a bundle's networks and tokenizer, its specification, and where it came from."""

from dataclasses import dataclass

from ldm_runtime.adapters.live import LiveAdapters
from ldm_runtime.bundle.manifest import BuildRecord
from ldm_runtime.conditioning import OpenNetwork
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.text import Tokenizer


@dataclass(frozen=True, kw_only=True)
class AdapterOrigin:
    """An adapter that is merged into a model.

    Attributes:
        name: Name of its file.
        sha256: Hash of the file.
        web_ui_sha256: What AUTOMATIC1111's web UI knows it by, see `AdapterFile`.
        scale: Factor of its updates.
    """

    name: str
    sha256: str
    web_ui_sha256: str
    scale: float


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Origin of a model, for results.

    Attributes:
        bundle_sha256: Hash of the bundle's manifest.
        build: Provenance of the bundle: its checkpoint and what it was made with.
        adapters: Adapters that are merged into its weights, in their order.
    """

    bundle_sha256: str
    build: BuildRecord
    adapters: tuple[AdapterOrigin, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenModel:
    """A model that is ready to run.

    Attributes:
        network: Returns the networks of the bundle by name.
        tokenizer: The bundle's, if it has one.
        spec: The model.
        origin: Its origin.
        live: Adapters that each request scales for itself, if it has any; the networks take their
            matrices, see `pipeline.live_adapters`.
    """

    network: OpenNetwork
    tokenizer: Tokenizer | None
    spec: ModelSpec
    origin: Origin
    live: LiveAdapters | None = None
