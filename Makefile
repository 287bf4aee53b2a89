# The two commands. Both do all the set-up themselves: a bare clone and Python 3.11+ are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Large pages spare XLA's CPU backend most of its page faults; ignored where there are none.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# Where it is set, every process that a test starts compiles all libraries to bytecode again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo video test parity slow lint clean
.DEFAULT_GOAL := demo

demo: $(BIN)/.installed
	$(BIN)/python -m iared2_jax.main --config=configs/cluttered_mnist.py --workdir=runs/cluttered_mnist

# The demo on clips: TimeSformer on Moving MNIST, beside the paper's baselines (Table 3).
video: $(BIN)/.installed
	$(BIN)/python -m iared2_jax.main --config=configs/moving_mnist.py --workdir=runs/moving_mnist

# Programs run once or twice here, so they are compiled quickly; the others below optimise them.
test: $(BIN)/.installed-test
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 XLA_FLAGS="$$XLA_FLAGS --xla_cpu_use_fusion_emitters=false" \
	  $(BIN)/python -m pytest -n 2 --dist worksteal -m "not parity and not slow"

# What PyTorch, timm and transformers say, live; the stored answers in `make test` need none of them.
parity: $(BIN)/.installed-parity
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/test_parity.py tests/test_weights.py tests/test_pth.py \
	  tests/test_augment.py tests/test_images.py tests/test_peers.py tests/test_imagenet_run.py \
	  tests/test_map_methods.py

# Whole ways that take minutes, or most of one.
slow: $(BIN)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

lint: $(BIN)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# Python compiles what it imports; of all that is installed (half of an installation's time) it is little.
$(BIN)/.installed: setup.cfg | $(BIN)/python
	$(BIN)/python -m pip install -q --no-compile -e .
	touch $@

$(BIN)/.installed-test: setup.cfg | $(BIN)/python
	$(BIN)/python -m pip install -q --no-compile -e '.[test,lint]'
	touch $@ $(BIN)/.installed

# timm would pull torchvision, which has no CPU build; the tests stand in for what it imports of it.
$(BIN)/.installed-parity: setup.cfg $(BIN)/.installed-test
	$(BIN)/python -m pip install -q --no-compile -e '.[test,parity]'
	$(BIN)/python -m pip install -q --no-compile --no-deps timm==1.0.31
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
