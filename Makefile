# make demo   the toolkit's road on the bundled model        make test   the tests
# Both set everything up first. MLX=cuda13 or cuda12 installs MLX for an NVIDIA GPU (Linux; default: the CPU).
PYTHON ?= python3
MLX ?= cpu
PY := .venv/bin/python
INSTALLED := .venv/installed-$(MLX)
DEMO := calibration_data/demo

.PHONY: demo test setup
.SILENT: setup $(INSTALLED)

demo: setup
	PYTHON=$(PY) runs/emoji.sh $(DEMO)

test: setup
	$(PY) -m ruff check .
	$(PY) -m pytest -q -n 2 --dist loadfile tests

setup: $(INSTALLED)

$(INSTALLED): requirements.txt requirements-diffusionkit.txt
	echo "Setting up .venv (once; about 1.5 GB) ..."
	$(PYTHON) -m venv .venv
	$(PY) -m pip uninstall --quiet --yes mlx-cpu mlx-cuda-12 mlx-cuda-13 2>/dev/null
	sed 's/mlx\[cpu\]/mlx[$(MLX)]/' requirements.txt > .venv/requirements.txt
	$(PY) -m pip install -qq --disable-pip-version-check -r .venv/requirements.txt || \
		{ echo "Installing failed: TROUBLESHOOTING_GUIDE.md, Issues 12 and 13"; exit 1; }
	$(PY) -m pip install -qq --disable-pip-version-check --no-deps -r requirements-diffusionkit.txt
	rm -f .venv/installed-* && touch $@
