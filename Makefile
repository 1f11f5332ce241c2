# Everything a developer runs. `make` alone lists the targets.
#
#   make PYTHON=python3.12 install      another interpreter for the virtual environment
#   make TORCH=torch==2.12.0 install    another torch, installed before the package

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV = .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip

# llama.cpp is built by its own recipe into its own environment, .venv-peers.
.PHONY: peers help venv install demo test test-all check fix docs bench bench-all clean

help: ## list the targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile

venv: $(BIN)/python ## create the virtual environment .venv

install: $(VENV)/.installed ## install torch and the package into .venv

demo: install ## race plain decoding against GliDe on the shipped model
	$(BIN)/glidecape demo

test: $(VENV)/.installed-dev ## run the default test suite
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/.installed-dev ## run every test, the long matrices too
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev ## lint, formatting, types and import layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(VENV)/.installed-dev ## repair what ruff can repair
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.installed-docs ## build the documentation into site/
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.installed-plots ## measure the shipped pair, ten minutes on four cores; report in runs/out/bench
	runs/bench.sh

bench-all: $(VENV)/.installed-plots ## measure every suite, with ../shared/data/eval when it is there; hours
	runs/bench.sh all

peers: ## build llama.cpp beside the benchmark, ten minutes on two cores (JOBS=2)
	PYTHON=$(PYTHON) runs/peers.sh

clean: ## remove caches and build outputs; keeps .venv
	rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("GlideCape needs Python 3.11 or newer: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch comes first, so that the package's own requirement finds it there and brings no other build.
$(VENV)/.installed: pyproject.toml $(BIN)/python
	$(PIP) install "$(TORCH)"
	$(PIP) install -e .
	touch $@

# `pip install --group` needs pip 25.1.
$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(PIP) install --upgrade "pip>=25.1"
	$(PIP) install --group dev
	touch $@

$(VENV)/.installed-docs: pyproject.toml $(BIN)/python
	$(PIP) install --upgrade "pip>=25.1"
	$(PIP) install --group docs
	touch $@

$(VENV)/.installed-plots: pyproject.toml $(VENV)/.installed
	$(PIP) install -e ".[plots]"
	touch $@
