# Every target sets up its own virtual environment in .venv; nothing else is needed than Python 3.11 or later.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt
# Python keeps what it compiled: the tests and benchmarks start some sixty processes.
unexport PYTHONDONTWRITEBYTECODE
SIZE ?= 2048x2048

.PHONY: demo test test-slow check bench bench-quick docs clean

# Installs what a render needs and none of the tools for development.
demo: $(INSTALLED)
	$(BIN)/hires render "a sun on the right over green mountains and a lake at dusk" --size $(SIZE) -o demo.png --overwrite

# Two tests at a time, each on one thread; a file's tests stay together, they share what they load.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python -m benchmarks scenes

# Every suite at toy sizes, and the GPU suite's dry run: that they run.
bench-quick: $(READY)
	$(BIN)/python -m benchmarks quick

# The site of docs/ into site/, in an environment of its own: it reads the sources and needs no torch. `make docs SERVE=1` serves it.
docs: $(VENV)/docs/.ready
	$(VENV)/docs/bin/mkdocs $(if $(SERVE),serve,build --strict)

$(VENV)/docs/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/pip install -q --disable-pip-version-check -c constraints.txt mkdocs mkdocs-material 'mkdocstrings[python]'
	touch $@

# torch first and pinned: a later resolver step then finds it satisfied instead of taking the newest build.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "hires needs Python 3.11 or later; make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	touch $@

# spandrel for the tests lies apart: its torchvision is a CUDA build, over which transformers trip beside a CPU torch.
$(READY): $(INSTALLED)
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps --upgrade --target $(VENV)/upscale spandrel torchvision einops
	@if command -v npm >/dev/null; then npm install --prefix $(VENV)/npm --no-audit --no-fund --ignore-scripts --loglevel=error node-sd-webui@0.0.8 || echo "no npm client; its test skips"; fi
	touch $@

clean:
	rm -rf $(VENV) demo.png site
