# Everything needs Python 3.11 only: each target makes the environment it uses.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# As many tests at a time as there are cores, one thread each.
TOGETHER := --numprocesses auto --maxprocesses 8 --dist worksteal
# The data sets of the recipes: unset, they come from the Hugging Face hub.
export LIGHTNING_DP_DATA

.PHONY: demo test test-slow test-device lint digits mnist results speed mutants clean

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(INSTALLED)  ## trains on scikit-learn's digits, in about a minute
	$(BIN)/lightning-dp fit --config recipes/digits/dp_sgd.yaml

test: $(INSTALLED)  ## the whole suite, without what is marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TOGETHER) -m "not slow"

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TOGETHER) -m slow

test-device: $(INSTALLED)  ## what depends on the device, with LIGHTNING_DP_TEST_DEVICE=cuda on a GPU
	$(BIN)/python -m pytest -m "not slow" tests/training/test_device.py tests/training/test_distributed.py tests/gradients/test_layers.py \
		tests/gradients/test_engines.py tests/gradients/test_coverage.py tests/gradients/test_recurrent.py tests/mechanism/test_clipping.py tests/mechanism/test_backprop.py tests/test_dfa.py \
		tests/mechanism/test_noise.py tests/mechanism/test_encoding.py tests/mechanism/test_denoising.py tests/mechanism/test_step.py tests/training/test_strategy.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

digits: $(INSTALLED)  ## the digits recipe as shipped, three seeds
	$(BIN)/python benchmarks/seeds.py recipes/digits/dp_sgd.yaml --seeds 1 2 3

mnist: $(INSTALLED)  ## the MNIST recipe as shipped, three seeds
	$(BIN)/python benchmarks/seeds.py recipes/mnist/dp_sgd.yaml --seeds 1 2 3

results: $(INSTALLED)  ## runs what docs/results.md has no result of (hours, if it has none), and writes it
	$(BIN)/python benchmarks/results.py

speed: $(INSTALLED)  ## step times beside non-private Lightning and Opacus, in about fifteen minutes
	$(BIN)/python benchmarks/speed.py --out runs/speed

mutants: $(INSTALLED)  ## mutation testing of the core, in about an hour
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[mutation]'
	$(BIN)/python benchmarks/mutants.py

clean:
	rm -rf $(VENV) dist runs mutants
