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
	$(PY) generate_calibration_data.py --model sd3-emoji --num-images 24 --batch-size 12 --seed 3 --calib-dir $(DEMO) --resume
	$(PY) tools/contact_sheet.py --calib-dir $(DEMO) --columns 8 --size 128
	$(PY) cache_adaround_data.py --calib-dir $(DEMO) --num-images 24 --stride 8 --resume
	$(PY) collect_layer_activations.py --calib-dir $(DEMO) --num-images 8 --resume
	$(PY) analyze_activations.py --calib-dir $(DEMO) --plot
	$(PY) analyze_activations_multitier.py --calib-dir $(DEMO) --plot
	$(PY) optimize_adaround.py --calib-dir $(DEMO) --iters 80 --resume
	$(PY) export_quantized_model.py --calib-dir $(DEMO) --force
	$(PY) evaluate_quantization.py --calib-dir $(DEMO) --num-steps 20 --variants w4-rtn,w4-adaround,native,a8,a8-token,native+a8-token --resume
	$(PY) draw_images.py "red heart" "police car" "mango" --model $(DEMO)/quantized_model --compare sd3-emoji --num-steps 20 --output $(DEMO)/drawn
	@echo
	@echo "Done. The quantized model is $(DEMO)/quantized_model; $(DEMO)/drawn/compare.png has images of it beside the original's."
	@echo "Look at $(DEMO)/evaluation/grid.png, too: original and quantized images side by side, differences x4."
	@echo "Everything else is below $(DEMO)/, and calibration_data/README.md explains every file."

test: setup
	$(PY) -m ruff check .
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
