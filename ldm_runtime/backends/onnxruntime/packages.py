"""Installed packages of ONNX Runtime: all write the same folder, so only one may be installed."""

from collections.abc import Callable, Mapping
from importlib import metadata

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


def conflict(installed: Mapping[str, str]) -> str | None:
    """Describe the conflict of several installed packages, and its fix; None if there is none."""
    if len(installed) < 2:
        return None
    names = " and ".join(f"{name} {version}" for name, version in installed.items())
    keep = next(name for name in ("onnxruntime-gpu", *installed) if name in installed)
    return (
        f"{names} are installed together and overwrite each other's files, so that providers go "
        f"missing; run `pip uninstall {' '.join(installed)}` and then `pip install {keep}`"
    )
