"""An open model: a bundle's networks and tokenizer, its specification, and where it came from."""

from dataclasses import dataclass

from ldm_runtime.bundle.manifest import BuildRecord
from ldm_runtime.conditioning import OpenNetwork
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.text import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Origin of a model, for results.

    Attributes:
        bundle_sha256: Hash of the bundle's manifest.
        build: Provenance of the bundle: its checkpoint and what it was made with.
    """

    bundle_sha256: str
    build: BuildRecord


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenModel:
    """A model that is ready to run.

    Attributes:
        network: Returns the networks of the bundle by name.
        tokenizer: The bundle's, if it has one.
        spec: The model.
        origin: Its origin.
    """

    network: OpenNetwork
    tokenizer: Tokenizer | None
    spec: ModelSpec
    origin: Origin
