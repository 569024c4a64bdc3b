# Two commands matter: `make demo` and `make test`. Both do only what is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := adapterhub trainer server adapters benchmarks examples tests

.PHONY: help install install-test base demo check test format clean bench-peers bench-serving

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "AdapterHub needs Python 3.11 or newer, found " + sys.version)'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --quiet --progress-bar off -c constraints.txt -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) install --quiet --progress-bar off -c constraints.txt -e '.[test]'
	touch $@

install: $(VENV)/installed ## make .venv and install what running needs

install-test: $(VENV)/installed-test ## also install what the tests need

base: install ## pull the embedded base model
	$(BIN)/hub base pull >/dev/null

demo: base ## train two adapters, serve them beside the bare base, print the answers and the gain
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

check: install-test ## format, lint, types, import contracts
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/lint-imports
	$(BIN)/pyright

test: check base ## everything CI runs
	$(BIN)/pytest

format: install-test ## format and fix what can be fixed
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

bench-peers: base ## build the environments of vLLM and llama.cpp for benchmarks
	$(BIN)/python -m benchmarks.peers.build

bench-serving: base ## measure serving beside its peers, draw and write docs/benchmarks.md; takes hours
	$(PIP) install --quiet --progress-bar off -c constraints.txt -e '.[bench]'
	-$(BIN)/python -m benchmarks.serving $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.churn
	$(BIN)/python -m benchmarks.accuracy
	$(BIN)/python -m benchmarks.plots
	$(BIN)/python -m benchmarks.report

clean: ## remove the virtual environment and caches, not your adapters
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache .hypothesis
