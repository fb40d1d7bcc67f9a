#!/usr/bin/env bash
# Build the wheel, install it with the CPU engine and without torch, and run the runtime's tests
# against that installation, with the source tree out of the way. Needs what `make test` installs.
#
#   scripts/test_wheel.sh           with the Python of .venv
#   scripts/test_wheel.sh 3.12      with another one, if this machine has it
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONPATH

MAX_PACKAGES=8
MAX_MEGABYTES=180

find_python() { # find_python VERSION: the path of a Python of that version, or nothing
  local candidate
  for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
    if "$candidate" -c 'import venv' 2>/dev/null; then echo "$candidate"; return; fi
  done
}

if (($# > 0)); then
  interpreter=$(find_python "$1")
  if [[ -z $interpreter ]]; then
    echo "Python $1 is not on this machine: not tested"
    exit 0
  fi
  environment=.venv-wheel-$1
else
  interpreter=.venv/bin/python
  environment=.venv-wheel
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=$PWD/$environment/bin/python
stamp=$environment/wheel.stamp
install=("$python" -m pip install --quiet --constraint constraints.txt)

.venv/bin/python -m build --wheel --no-isolation --outdir "$folder" .
wheel=("$folder"/*.whl)

if [[ pyproject.toml -nt $stamp || constraints.txt -nt $stamp || scripts/test_wheel.sh -nt $stamp ]]; then
  "$interpreter" -m venv --clear "$environment"
  "${install[@]}" "${wheel[0]}[cpu]"
  packages=$("$python" -m pip list --format=freeze --exclude pip --exclude setuptools | wc -l)
  bytes=$(du -sb --exclude='pip*' --exclude='setuptools*' --exclude='_distutils_hack' \
    "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" | cut -f1)
  echo "the runtime with the CPU engine: $packages packages, $((bytes / 1000000)) MB"
  if ((packages > MAX_PACKAGES || bytes > MAX_MEGABYTES * 1000000)); then
    echo "error: at most $MAX_PACKAGES packages and $MAX_MEGABYTES MB are promised" >&2
    exit 1
  fi
  "${install[@]}" pytest pytest-timeout hypothesis
  touch "$stamp"
else
  "${install[@]}" --no-deps --force-reinstall "${wheel[0]}"
fi

mkdir "$folder/tests"
cp -r tests/runtime "$folder/tests/runtime"
cp pyproject.toml "$folder" # for pytest's settings
if [[ -f tests/conftest.py ]]; then cp tests/conftest.py "$folder/tests"; fi
cd "$folder"
"$python" - <<'PYTHON'
import importlib.util
import sysconfig
from pathlib import Path

import ldm_runtime

site_packages = Path(sysconfig.get_path("purelib"))
assert Path(ldm_runtime.__file__).is_relative_to(site_packages), ldm_runtime.__file__
for heavy in ("torch", "transformers", "diffusers", "onnx"):
    assert importlib.util.find_spec(heavy) is None, f"{heavy} is installed"
PYTHON
"$python" -m pytest -p no:cacheprovider tests/runtime
