"""Installed packages of ONNX Runtime: all are one module, so that only one may be installed."""

from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

#: Distributions that install the module `onnxruntime`.
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino")


def installed_packages(find: Callable[[str], str] = metadata.version) -> dict[str, str]:
    """Return the versions of the packages that are installed, by name."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = find(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def folder_of(name: str) -> Path | None:
    """Return the folder of `sys.path` that a package is installed in; None if it is not."""
    try:
        return Path(str(metadata.distribution(name).locate_file(""))).resolve()
    except metadata.PackageNotFoundError:
        return None


def conflict(
    installed: Mapping[str, str], folder_of: Callable[[str], Path | None] = folder_of
) -> str | None:
    """Describe the conflict of several installed packages, and its fix; None if there is none.

    Args:
        installed: Their versions by name.
        folder_of: Says where a package is installed.
    """
    if len(installed) < 2:
        return None
    keep = next(name for name in ("onnxruntime-gpu", *installed) if name in installed)
    fix = f"run `pip uninstall {' '.join(installed)}` and then `pip install {keep}`"
    folders = {name: folder_of(name) for name in installed}
    if len({*folders.values()} - {None}) <= 1:
        names = " and ".join(f"{name} {version}" for name, version in installed.items())
        return (
            f"{names} are installed together and overwrite each other's files, so that providers "
            f"go missing; {fix}"
        )
    places = " and ".join(
        f"{name} {version} in {folders[name]}" for name, version in installed.items()
    )
    return (
        f"there are {places}; Python imports the one that comes first on sys.path, and the "
        f"providers of the others are missing; {fix}"
    )
