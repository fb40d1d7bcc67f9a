"""Scripts in their own processes: the environment in which they find what they import."""

import os

from measuring.rows import ROOT


def script_environment() -> dict[str, str]:
    """Return this process's environment, with the repository's root and `benchmarks` importable."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
