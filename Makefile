# make demo   the toolkit's road on the bundled model
# make check  lint, format, types and the quick tests        make test   lint and all tests
# make clients  exports in other people's programs (an hour; .venv-clients)
# Each sets everything up first. MLX=cuda13 or cuda12 installs MLX for an NVIDIA GPU (Linux; default: what is installed, or
# the CPU); PYTHON=/path/to/python chooses the Python (default: python3, or another one from 3.10 to 3.14 that is there).
PYTHON ?=
MLX ?= $(patsubst .venv/installed-%,%,$(firstword $(wildcard .venv/installed-*) .venv/installed-cpu))
PY := .venv/bin/python
INSTALLED := .venv/installed-$(MLX)
DEMO := calibration_data/demo

.PHONY: demo check test clients setup
.SILENT: setup $(INSTALLED)

demo: setup
	PYTHON=$(PY) runs/emoji.sh $(DEMO)

check: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q -n 2 -m "not slow"

test: setup
	$(PY) -m ruff check .
	$(PY) -m pytest -q -n 2 --dist loadfile tests

clients: setup
	sh tests/clients/run.sh

setup: $(INSTALLED)
	echo "Everything is in .venv: source .venv/bin/activate"

$(INSTALLED): pyproject.toml requirements.txt requirements-diffusionkit.txt requirements-test.txt
	PYTHON="$(PYTHON)" sh tools/set_up.sh $(MLX)
