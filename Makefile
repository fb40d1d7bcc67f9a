# The same commands for people and for CI. `make demo` and `make test` do all the set-up: they need
# Python 3.11, a C library and pip, and install into .venv and .venv-wheel only.

PYTHON ?= $(firstword $(shell command -v python3.11 || command -v python3) python3)
PIP := .venv/bin/python -m pip install --quiet --constraint constraints.txt
PINS := pyproject.toml constraints.txt

.NOTPARALLEL:
.PHONY: help demo gallery serve test test-page test-ray soak check docs bench peers gpu-report clean distclean

help:
	@echo "make demo       export the small model that comes along and generate out/demo.png"
	@echo "make gallery    export the examples of every other task and generate a sheet of each"
	@echo "make serve      serve the small model over HTTP, on this machine alone"
	@echo "make test       all tests, those of the page if there is chromium, then the wheel's, without torch"
	@echo "make test-ray   the tests that start a Ray cluster on this machine, which takes two minutes"
	@echo "make soak       ten minutes of clients and faults against a server, every image compared"
	@echo "make check      format, lint, imports, types, spelling, words and workflows"
	@echo "make docs       write the pages and pictures of docs/ that come from the code"
	@echo "make bench      measure this machine"
	@echo "make peers      install the programs that benchmarks/latency.py --peers compares, each apart"
	@echo "make gpu-report run all that needs an NVIDIA GPU and write out/gpu-report.txt, to be sent"
	@echo "make clean      remove caches and build outputs; distclean also the environments"

demo: .venv/demo.stamp
	.venv/bin/python models/shapes/demo.py

gallery: .venv/demo.stamp
	.venv/bin/python models/shapes/gallery.py

serve: .venv/serve.stamp engines/manifest.json
	.venv/bin/ldm serve engines/

engines/manifest.json: .venv/demo.stamp
	.venv/bin/python models/shapes/demo.py

# One worker per core, one thread per worker: most tests are too small to share, exports do not scale.
# In the order of the files: else those of few tests come last, and few tests are slow ones.
# A worker that dies ends the run: pytest-xdist would replace it, and then wait for its tests for ever.
# The page's tests need Debian's package chromium and the loopback network, and come after the others.
test: .venv/test.stamp
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not gpu and not quiet and not browser and not ray" --no-sockets --numprocesses=auto --dist=loadfile \
		--max-worker-restart=0 \
		--no-loadscope-reorder --cov=ldm_runtime --cov-fail-under=95
	@if command -v chromium >/dev/null; then $(MAKE) test-page; \
		else echo "chromium is not on this machine: the page is not tested"; fi
	scripts/test_wheel.sh

test-page: .venv/test.stamp
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m browser tests/browser

# Ray is large and needs sockets, hence an environment of its own and no part of `make test`.
test-ray: .venv-ray/test.stamp
	OMP_NUM_THREADS=1 .venv-ray/bin/python -m pytest -m ray tests/serve/test_ray.py

soak: .venv/test.stamp
	.venv/bin/python benchmarks/soak.py --seconds 600

check: .venv/test.stamp
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/lint-imports
	.venv/bin/mypy
	.venv/bin/codespell
	.venv/bin/codespell --dictionary scripts/words.txt ldm_runtime ldm_export ldm_serve docs README.md CONTRIBUTING.md
	.venv/bin/zizmor --offline --quiet .github

docs: .venv/test.stamp
	.venv/bin/python -m scripts.sampler_page
	.venv/bin/python -m scripts.floors
	.venv/bin/python -m scripts.released_page
	.venv/bin/python -m scripts.trained_page
	.venv/bin/python -m scripts.peers_page
	.venv/bin/python -m scripts.families_page
	.venv/bin/python -m scripts.serving_figures

bench: .venv/demo.stamp
	.venv/bin/python benchmarks/latency.py

# Each in an environment of its own, since their pins contradict each other; stable-diffusion.cpp is
# compiled, which takes a C++ compiler, CMake and a few minutes. `make -k peers` goes on after a failure.
# The files name all that is installed: torchvision, which optimum-intel asks for, is there for CUDA alone.
PEERS ?= diffusers openvino_genai optimum_onnx stable_diffusion_cpp
peers: $(PEERS:%=.venv-peers/%/.installed)

.venv-peers/%/.installed: benchmarks/peers/environments/%.txt
	@echo "installing into .venv-peers/$*"
	$(PYTHON) -m venv --clear .venv-peers/$*
	.venv-peers/$*/bin/python -m pip install --quiet --no-deps --requirement $<
	touch $@

gpu-report: .venv/test.stamp
	.venv/bin/python scripts/gpu_report.py

clean:
	rm -rf .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-peers .venv-ray .venv-wheel*

# What the demo needs is installed first and alone, so that it does not wait for the test tools.
.venv/demo.stamp: $(PINS)
	@echo "installing into .venv, which takes a few minutes the first time"
	$(PYTHON) -m venv .venv
	$(PIP) --editable '.[export,cpu]'
	touch $@

.venv/serve.stamp: .venv/demo.stamp
	$(PIP) --editable '.[serve]'
	touch $@

.venv-ray/test.stamp: $(PINS)
	@echo "installing into .venv-ray"
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[export,cpu,serve,ray]' \
		httpx2 pytest pytest-timeout safetensors
	touch $@

.venv/test.stamp: $(PINS)
	@echo "installing into .venv, which takes a few minutes the first time"
	$(PYTHON) -m venv .venv
	$(PIP) hatchling --editable '.[export,cpu,openvino,otel,serve,tensorrt-rtx,test]'
	touch .venv/demo.stamp .venv/serve.stamp $@
