"""The answer to `--version`: the program, Python and the library that runs or makes graphs."""

import platform
from collections.abc import Mapping

from ldm_runtime.version import version


def version_line(program: str, others: Mapping[str, str] | None = None) -> str:
    """Return, for instance, "ldm 0.2.0, Python 3.11.7, ONNX Runtime 1.32.0".

    Args:
        program: Name of the command.
        others: Versions of further libraries, by the name to show.
    """
    # Imported on demand: importlib.metadata takes long to import, and only this needs it.
    from ldm_runtime.backends.onnxruntime.packages import installed_packages

    parts = [f"{program} {version()}", f"Python {platform.python_version()}"]
    parts += [
        f"ONNX Runtime {each}" + ("" if name == "onnxruntime" else f" ({name})")
        for name, each in installed_packages().items()
    ] or ["no ONNX Runtime"]
    return ", ".join([*parts, *(f"{name} {each}" for name, each in (others or {}).items())])
