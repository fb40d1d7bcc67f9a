"""Opening of bundles: a manifest is read, a backend chosen, and networks wait to be needed."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ldm_runtime.adapters.files import read_adapter
from ldm_runtime.adapters.live import LiveAdapters
from ldm_runtime.adapters.merging import (
    AdapterInput,
    Adapters,
    MergedAdapters,
    read_adapters,
)
from ldm_runtime.backends import BackendName, choose_backend, get_backend
from ldm_runtime.backends.contract import Engine, EngineSource, RunOptions, SharedResources
from ldm_runtime.backends.networks import OpenNetworks
from ldm_runtime.backends.turns import Turns
from ldm_runtime.bundle.files import checked_file, sha256_of
from ldm_runtime.bundle.manifest import MANIFEST_NAME, Manifest, load_manifest
from ldm_runtime.conditioning import open_tokenizer
from ldm_runtime.errors import LdmError, RequestError
from ldm_runtime.inputs.textual_inversion import read_learned_words
from ldm_runtime.pipeline.live_adapters import origin_of
from ldm_runtime.pipeline.open_model import OpenModel, Origin
from ldm_runtime.requests.input_types import FileInput
from ldm_runtime.text import Tokenizer


@dataclass(frozen=True, kw_only=True)
class OpeningOptions:
    """How bundles are opened; `ldm_runtime.generator.Generator` says what each means."""

    backend: BackendName
    threads: int | None
    check_hashes: bool
    options: RunOptions
    textual_inversions: Mapping[str, FileInput] = field(default_factory=dict)
    adapters: Adapters = field(default_factory=dict)
    live_adapters: Mapping[str, AdapterInput] = field(default_factory=dict)
    turns: Turns | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenBundle:
    """An open bundle.

    Attributes:
        folder: Its folder.
        manifest: Its manifest.
        backend: The backend that runs its networks.
        networks: Its networks, each opened by the first call for it; the owner closes them.
        model: The same as a model.
    """

    folder: Path
    manifest: Manifest
    backend: str
    networks: OpenNetworks
    model: OpenModel


def open_bundle(
    bundle: str | Path, options: OpeningOptions, *, sha256: str | None = None
) -> OpenBundle:
    """Open a bundle, but none of its networks.

    Args:
        bundle: Folder made by `ldm-export`.
        options: How it is opened.
        sha256: Hash that its manifest must have; None takes any.

    Raises:
        RequestError: A textual inversion or an adapter cannot be read, or is for another model.
        BundleError: The bundle is incomplete or altered, or not the one with that hash.
        BackendError: The backend cannot run here.
    """
    folder = Path(bundle).resolve()  # some files are opened later, wherever that is
    manifest = load_manifest(folder, sha256=sha256)
    adapters, live = _adapters(folder, manifest, options), _live(folder, manifest, options)
    backend = choose_backend(
        options.backend,
        manifest,
        bundle=folder,
        options=options.options,
        adapters="live" if live is not None else "merged" if adapters.adapters else "none",
    )
    networks = _networks(folder, manifest, backend, options, adapters, live)
    model = OpenModel(
        network=networks,
        tokenizer=_tokenizer(folder, manifest, options),
        spec=manifest.spec,
        origin=Origin(
            bundle_sha256=sha256_of(folder / MANIFEST_NAME),
            build=manifest.build,
            adapters=tuple(origin_of(each.file, each.scale) for each in adapters.adapters),
        ),
        live=live,
    )
    return OpenBundle(
        folder=folder, manifest=manifest, backend=backend, networks=networks, model=model
    )


def open_refiner(bundle: str | Path, options: OpeningOptions) -> OpenBundle:
    """Open the bundle of a refiner, which takes no adapters.

    Args:
        bundle: Folder made by `ldm-export`.
        options: How the refined bundle is opened.

    Raises:
        LdmError: See `open_bundle`; the sentence says that it is about the refiner.
    """
    try:
        return open_bundle(bundle, replace(options, adapters={}, live_adapters={}))
    except RequestError as error:
        raise RequestError(error.field, f"the refiner: {error.reason}") from error
    except LdmError as error:
        raise type(error)(f"the refiner: {error}") from error


def _networks(
    folder: Path,
    manifest: Manifest,
    backend: str,
    options: OpeningOptions,
    adapters: MergedAdapters,
    live: LiveAdapters | None,
) -> OpenNetworks:
    module = get_backend(backend)
    source = partial(
        EngineSource,
        bundle=folder,
        manifest=manifest,
        threads=options.threads,
        check_hashes=options.check_hashes,
        options=options.options,
        shared=SharedResources(),
        changes=adapters,
    )

    def open_engine(name: str) -> Engine:
        component = manifest.component(name)
        branches = () if live is None else live.branches(name)
        inputs = tuple(input_ for each in branches for input_ in each.signatures)
        component = replace(component, inputs=component.inputs + inputs)
        return module.open_engine(source(component=component, branches=branches))

    owner = f"the generator of {folder}"
    follows = module.ABILITIES.survives_fork
    return OpenNetworks(open_engine, owner, survives_fork=follows, turns=options.turns)


def _adapters(folder: Path, manifest: Manifest, options: OpeningOptions) -> MergedAdapters:
    try:
        return MergedAdapters(read_adapters(options.adapters), folder, manifest)
    except ValueError as error:
        raise RequestError("adapters", str(error)) from error


def _live(folder: Path, manifest: Manifest, options: OpeningOptions) -> LiveAdapters | None:
    if not options.live_adapters:
        return None
    try:
        files = {name: read_adapter(file) for name, file in options.live_adapters.items()}
        return LiveAdapters(files, folder, manifest)
    except ValueError as error:
        raise RequestError("live_adapters", str(error)) from error


def _tokenizer(folder: Path, manifest: Manifest, options: OpeningOptions) -> Tokenizer | None:
    try:
        words = read_learned_words(options.textual_inversions, manifest.spec)
    except ValueError as error:
        raise RequestError("textual_inversions", str(error)) from error
    path = manifest.tokenizer_file
    if path is None:
        return None
    file = checked_file(folder, manifest, path, hashed=options.check_hashes)
    return open_tokenizer(file, manifest.spec, words)
