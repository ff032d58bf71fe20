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
	$(PY) generate_calibration_data.py --model sd3-emoji --num-images 12 --batch-size 6 --seed 3 --calib-dir $(DEMO) --resume
	$(PY) tools/contact_sheet.py --calib-dir $(DEMO)
	$(PY) cache_adaround_data.py --calib-dir $(DEMO) --resume
	$(PY) collect_layer_activations.py --calib-dir $(DEMO) --resume
	$(PY) analyze_activations.py --calib-dir $(DEMO) --plot
	$(PY) analyze_activations_multitier.py --calib-dir $(DEMO) --plot
	@echo
	@echo "Done. All of it is below $(DEMO)/ (calibration_data/README.md explains every file):"
	@echo "  contact_sheet.png     the images - look at this one"
	@echo "  manifest.json         what was sampled        samples/      the latents of every step"
	@echo "  adaround_cache/       what every block saw and gave, for adaptive rounding"
	@echo "  activations/          the range, shift and histogram of every layer's input, per step"

test: setup
	$(PY) -m pytest -q tests

setup: $(INSTALLED)

$(INSTALLED): requirements.txt requirements-diffusionkit.txt
	echo "Setting up .venv (once; about 1.5 GB) ..."
	$(PYTHON) -m venv .venv
	$(PY) -m pip uninstall --quiet --yes mlx-cpu mlx-cuda-12 mlx-cuda-13 2>/dev/null
	sed 's/mlx\[cpu\]/mlx[$(MLX)]/' requirements.txt > .venv/requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r .venv/requirements.txt || \
		{ echo "Installing failed: TROUBLESHOOTING_GUIDE.md, Issues 12 and 13"; exit 1; }
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-diffusionkit.txt
	rm -f .venv/installed-* && touch $@
