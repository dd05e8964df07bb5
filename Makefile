# Every target sets up its own virtual environment in .venv; nothing else is needed than Python 3.11 or later.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Python keeps what it compiled: the tests and benchmarks start some sixty processes.
unexport PYTHONDONTWRITEBYTECODE
SIZE ?= 2048x2048

.PHONY: demo test test-slow check bench bench-quick clean

demo: $(READY)
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

bench: $(READY)
	$(BIN)/python -m benchmarks scenes

# Every suite at toy sizes, and the GPU suite's dry run: that they run.
bench-quick: $(READY)
	$(BIN)/python -m benchmarks quick

# spandrel for the tests lies apart: its torchvision is a CUDA build, over which transformers trip beside a CPU torch.
# torch first and pinned: a later resolver step then finds it satisfied instead of taking the newest build.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "hires needs Python 3.11 or later; make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-deps --upgrade --target $(VENV)/upscale spandrel torchvision einops
	@if command -v npm >/dev/null; then npm install --prefix $(VENV)/npm --no-audit --no-fund --ignore-scripts --loglevel=error node-sd-webui@0.0.8 || echo "no npm client; its test skips"; fi
	touch $(READY)

clean:
	rm -rf $(VENV) demo.png
