"""A bundle in a model repository of NVIDIA Triton, complete or not at all."""

import hashlib
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ldm_runtime.bundle.files import check_file
from ldm_runtime.bundle.manifest import MANIFEST_NAME, ComponentRecord, Manifest, load_manifest
from ldm_runtime.durable import (
    exchange_folders,
    link_or_copy,
    locked_folder,
    sync,
    sync_folders,
    write_file,
)
from ldm_runtime.errors import RequestError
from ldm_runtime.triton.model_config import Instances, generator_config, network_config

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_VERSION = "1"
#: The code of the model, which is copied: a repository needs nothing from here but the package.
_CODE = Path(__file__).with_name("model.py")


@dataclass(frozen=True, kw_only=True)
class TritonOptions:
    """What is put into a model repository.

    Attributes:
        name: Name of the model; None is that of the bundle's folder.
        instances: Instances of the model, and of every network.
        max_batch: Most images that share a call of the UNet.
        networks: Whether every network is there as a model of the ONNX Runtime backend, too.
        generator: Arguments of `Generator` that the model opens the bundle with, as text; "true" is
            a flag that is set.
        replace: Whether to replace models of the same names.
    """

    name: str | None = None
    instances: Instances = field(default_factory=Instances)
    max_batch: int = 4
    networks: bool = False
    generator: Mapping[str, str] = field(default_factory=dict)
    replace: bool = False


def add_to_repository(bundle: Path, repository: Path, options: TritonOptions) -> list[Path]:
    """Add the models of a bundle to a model repository, which is made if need be.

    Every model appears complete or not at all, the one that generates last. Files of the bundle are
    hard links where the file system has them, else copies.

    Args:
        bundle: Folder made by `ldm-export`; all of its files are compared with their hashes.
        repository: The model repository.
        options: What is put into it.

    Returns:
        The folders of the models.

    Raises:
        BundleError: The bundle is incomplete or altered.
        RequestError: The name is not one of a model, is taken, or another process is adding it.
    """
    name = bundle.resolve().name if options.name is None else options.name
    if not _NAME.fullmatch(name):
        fix = "take letters, digits, _, . and -, as in --name sd15"
        raise RequestError("name", f"{name!r} is not the name of a Triton model; {fix}")
    manifest = load_manifest(bundle)
    for record in manifest.files:
        check_file(bundle, record)
    networks = {
        f"{name}_{component.name}": component
        for component in (manifest.components if options.networks else ())
    }
    for model in (*networks, name):
        if (repository / model).exists() and not options.replace:
            fix = "add --replace to replace it, or give another --name"
            raise RequestError("out", f"{repository / model} is there already; {fix}")
    with _working_folder(repository, name) as folder:
        for model, component in networks.items():
            _write_network(folder / model, bundle, manifest, component, options.instances)
        _write_generator(folder / name, bundle, manifest, options)
        for model in (*networks, name):
            _publish(folder / model, repository / model, replace=options.replace)
    return [repository / model for model in (name, *networks)]


@contextmanager
def _working_folder(repository: Path, name: str) -> Iterator[Path]:
    """Yield an empty folder that models can be moved from, which is removed in the end.

    It is next to the repository, in which Triton takes every folder for a model, and inside only
    where nothing can be moved in from there. What a killed process has left in it is removed.

    Raises:
        RequestError: Another process is adding a model of this name.
    """
    repository.mkdir(parents=True, exist_ok=True)
    place = repository.resolve()
    parent = place.parent if _can_be_moved(place.parent, place) else place
    folder = parent / f".{place.name}.{name}.partial"
    adding = RequestError("out", f"another process is adding {name} to {repository}; wait for it")
    with locked_folder(folder, adding):
        try:
            _clear(folder)
            yield folder
        finally:
            shutil.rmtree(folder)


def _can_be_moved(source: Path, target: Path) -> bool:
    """Try whether this user can move from one folder to another: not to a mount point."""
    name = f".{secrets.token_hex(4)}.part"
    try:
        (source / name).touch(exist_ok=False)
    except OSError:
        return False
    try:
        place = (source / name).rename(target / name)
    except OSError:
        place = source / name
    place.unlink()
    return place.parent == target


def _clear(folder: Path) -> None:
    for each in folder.iterdir():
        shutil.rmtree(each)


def _publish(folder: Path, place: Path, *, replace: bool) -> None:
    """Put a complete model in its place; the one that it replaces goes to where it was.

    Raises:
        OSError: There is one that is not to be replaced, which came in the meantime.
    """
    sync_folders([each for each in folder.rglob("*") if each.is_file()], folder)
    if not (replace and place.exists()):
        folder.rename(place)
    elif not exchange_folders(folder, place):
        place.rename(folder.with_name(f"{folder.name}.old"))
        folder.rename(place)
    sync(place.parent)


def _write_generator(
    folder: Path, bundle: Path, manifest: Manifest, options: TritonOptions
) -> None:
    for path in (MANIFEST_NAME, *(record.path for record in manifest.files)):
        _link(bundle / path, folder / _VERSION / "bundle" / path)
    write_file(folder / _VERSION / _CODE.name, _CODE.read_bytes())
    sha256 = hashlib.sha256((folder / _VERSION / "bundle" / MANIFEST_NAME).read_bytes())
    config = generator_config(
        folder.name,
        manifest.spec,
        options.instances,
        max_batch=options.max_batch,
        options={**options.generator, "sha256": sha256.hexdigest()},
    )
    write_file(folder / "config.pbtxt", config.encode())


def _write_network(
    folder: Path, bundle: Path, manifest: Manifest, component: ComponentRecord, instances: Instances
) -> None:
    """Write a network: a graph of several files is a folder called like the graph."""
    graphs = {graph.variant: graph.file for graph in component.graphs}
    is_fp16 = instances.kind == "gpu" and "fp16" in graphs
    inside = folder / _VERSION / "model.onnx"
    _link(bundle / graphs["fp16" if is_fp16 else "fp32"], inside / "model.onnx")
    weights = Path(component.weights_file)
    _link(bundle / weights, inside / weights.name)
    config = network_config(folder.name, component, manifest.spec, instances)
    write_file(folder / "config.pbtxt", config.encode())


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    link_or_copy(source.resolve(), target)
