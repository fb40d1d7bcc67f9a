"""Run everything that needs a GPU and write one file that can be sent to us: `make gpu-report`.

What is in it: versions, what `ldm doctor` says, the GPU tests and the latency benchmark. Folder
names of this machine are cut out; read it before you send it all the same.
"""

import argparse
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_PACKAGES = re.compile(r"cuda|cudnn|ldm|numpy|nvidia|onnx|openvino|tensorrt|torch", re.IGNORECASE)
_DOCTOR = "import sys; from ldm_runtime.cli import main; sys.exit(main(['doctor']))"
_PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("graphics card", ("nvidia-smi",)),
    ("ldm doctor", (sys.executable, "-c", _DOCTOR)),
    ("tests", (sys.executable, "-m", "pytest", "-m", "gpu", "-rA", "--tb=short", "--durations=10")),
    ("latency", (sys.executable, "benchmarks/latency.py", "--json")),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report: 0 if every part succeeded, 1 if one failed, which is worth sending too."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out/gpu-report.txt")
    out = parser.parse_args(argv).out
    out.parent.mkdir(parents=True, exist_ok=True)
    sections = [_section("machine", _machine())]
    failed = []
    for title, command in _PARTS:
        sys.stderr.write(f"{title} ...\n")
        status, text = _run(command)
        sections.append(_section(f"{title} (exit status {status})", text))
        if status != 0:
            failed.append(title)
        out.write_text("\n".join(sections), encoding="utf-8")
    sys.stderr.write(f"failed: {', '.join(failed) or 'nothing'}\n")
    sys.stdout.write(f"{out}\n")
    return 1 if failed else 0


def _machine() -> str:
    installed = {
        each.metadata["Name"]: each.version
        for each in distributions()
        if _PACKAGES.search(each.metadata["Name"] or "")
    }
    lines = [
        datetime.now(UTC).isoformat(timespec="seconds"),
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        f"commit {_run(('git', 'rev-parse', 'HEAD'))[1].strip()}",
        *(f"{name} {version}" for name, version in sorted(installed.items())),
    ]
    return "\n".join(lines)


def _run(command: Sequence[str]) -> tuple[int, str]:
    """Return the exit status and everything that was printed."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
    except OSError as error:
        return 127, f"{command[0]}: {error.strerror}"
    text = done.stdout.decode(errors="replace")
    for folder, name in ((ROOT, "."), (Path.home(), "~")):
        text = text.replace(str(folder), name)
    return done.returncode, text


def _section(title: str, text: str) -> str:
    return f"== {title} ==\n{text.rstrip()}\n"


if __name__ == "__main__":
    sys.exit(main())
