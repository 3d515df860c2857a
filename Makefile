PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help bench demo test test-slow test-weights faults soak audit check lint types layers docs format setup setup-dev clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: setup ## Pictures to new pictures on the data in the box: about 12 minutes on 2 CPU cores
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

test: setup-dev ## Run the tests, on all cores
	$(BIN)/pytest -n auto

test-slow: setup-dev ## Run the tests that take minutes
	$(BIN)/pytest -m slow

check: setup-dev lint types layers test ## All that CI runs: lint, types, import contracts, tests, docs

faults: setup-dev ## Flip bits, feed broken inputs, kill, fail every call that writes, lose power, take safeties away: hours
	$(BIN)/pytest -m faults tests

soak: setup-dev ## Train for hours, killed once a minute, beside a run that is left alone
	$(BIN)/python tests/faults/soak.py $${SOAK:-runs/soak}

audit: setup-dev ## Compare constraints.txt with the known vulnerabilities (asks pypi.org)
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

test-weights: setup-dev ## Run the tests on published weights: LDMKIT_TEST_WEIGHTS=directory make test-weights
	$(BIN)/pytest -m weights

bench: setup-dev ## Time ldmkit beside its peers, and whole stages: hours on 2 cores; wants an idle machine
	$(PIP_INSTALL) --editable '.[bench]'
	$(BIN)/python bench/compare.py all --memory --quiet 20 --processes 3 --json bench.json --markdown > bench.md
	$(BIN)/python bench/stages.py --json stages.json

lint: setup-dev ## Format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup-dev ## Types
	$(BIN)/pyright

layers: setup-dev ## Who may import whom
	$(BIN)/lint-imports

docs: setup-dev ## Write docs/cli.md and docs/presets.md from the commands
	$(BIN)/python docs/generate_cli.py > docs/cli.md
	$(BIN)/python docs/generate_presets.py > docs/presets.md

format: setup-dev ## Put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(VENV)/.installed ## Make .venv and install ldmkit
setup-dev: $(VENV)/.installed-dev ## The same with the tools for development

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ldmkit needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.installed

clean: ## Remove what was built, not what was trained
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
