# Everything a fresh machine needs is Python >= 3.10 and a C++17 compiler: `make help`.

PYTHON ?= python3
VENV   ?= .venv
# Which torch to install, such as torch==2.13.0. An environment that has a torch keeps it.
TORCH  ?= torch
# What `make demo` runs.
DEMO   ?= -m experiments.digits run
# An unpacked wheel of the oldest supported torch; without it, symbols are looked up in the installed.
OLDEST_TORCH ?=
# How long `make fuzz` looks at each of its targets.
FUZZ_SECONDS ?= 60

BIN     := $(VENV)/bin
# What the native modules are built from. The package itself is installed editable: it lies at the
# top of the repository, so that Python started here finds these files first in any case.
SOURCES := $(shell find csrc _build_backend -type f -not -name '*.pyc') setup.py pyproject.toml
BUILT   := $(VENV)/.ksm_ext-built
CPP_FILES := $(shell find csrc tools -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# uv users: the same local wheels as pip.
export UV_FIND_LINKS := $(PIP_FIND_LINKS)

.DEFAULT_GOAL := help
.PHONY: help build demo experiments test test-all docs bench lint format cuda-check cuda-budget cuda-host-check avx512-check sanitize fuzz clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: $(BUILT) ## an environment in $(VENV) with ksm_ext built and installed in it

demo: $(VENV)/.demo $(BUILT) ## from nothing to the main experiment: environment, build, run
	$(BIN)/python $(DEMO)

experiments: $(VENV)/.experiments $(BUILT) ## what the experiments need; then python -m experiments.NAME run

test: $(VENV)/.test $(BUILT) ## the tests that take seconds
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m "not slow" -n auto --dist worksteal

test-all: $(VENV)/.test $(BUILT) ## every test
	$(BIN)/pytest -q

docs: $(VENV)/.docs $(BUILT) ## the documentation in build/docs; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs

bench: $(VENV)/.test $(BUILT) ## benchmarks against PyTorch and scikit-learn, with their ratios
	@mkdir -p build
	$(BIN)/pytest -q benchmarks --benchmark-json=build/benchmarks.json

lint: $(VENV)/.lint $(BUILT) ## formats, rules and types, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(BIN)/mypy

format: $(VENV)/.lint ## format Python and C++
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

cuda-check: $(BUILT) ## compile the CUDA kernels, find one for every operator, and torch's symbols; needs nvcc, no GPU
	PATH="$(abspath $(BIN)):$$PATH" KSM_EXT_CUDA=1 $(BIN)/python setup.py -q build_ext \
	    --build-lib build/cuda-check --build-temp build/cuda-check/temp
	$(BIN)/python tools/check_cuda_registration.py build/cuda-check
	$(BIN)/python tools/check_symbols.py build/cuda-check $(OLDEST_TORCH)

cuda-budget: cuda-check ## count what the machine code of every kernel costs; BUDGET=--write agrees to it
	$(BIN)/python tools/cuda_budget.py build/cuda-check/temp $(BUDGET)

cuda-host-check: ## run every CUDA kernel on the host; needs no CUDA
	tools/cuda_on_host/run.sh

avx512-check: ## run the AVX-512 kernels emulated; needs libsimde-dev, no AVX-512
	tools/check_avx512.sh

sanitize: $(VENV)/.test $(BUILT) ## the operators' tests on CPU kernels with ASan and UBSan
	PATH="$(abspath $(BIN)):$$PATH" PYTHON=python tools/sanitize.sh

fuzz: $(VENV)/.fuzz $(BUILT) ## arbitrary bytes for the readers of files and for packed masks
	for target in surrogate features runs tables masks; do \
	    PYTHONPATH=. $(BIN)/python tools/fuzz/run.py $$target $(FUZZ_SECONDS) || exit 1; done

clean: ## remove everything that was built, the environment included
	rm -rf $(VENV) build *.egg-info ksm_ext/*.so

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first: ksm_ext is then built beside it and changes nothing about it.
$(VENV)/.torch: | $(BIN)/python
	$(BIN)/pip install -q "$(TORCH)" "setuptools>=77" "setuptools-scm>=8" wheel ninja packaging
	@touch $@

$(BUILT): $(SOURCES) | $(VENV)/.torch
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install -q --no-build-isolation -e .
	@touch $@

# The dependencies of one extra. ksm_ext itself is there already, and is not built again.
$(VENV)/.demo $(VENV)/.experiments $(VENV)/.test $(VENV)/.docs $(VENV)/.fuzz $(VENV)/.lint: $(VENV)/.%: pyproject.toml | $(BUILT)
	$(BIN)/pip install -q "ksm_ext[$*]"
	@touch $@
