# Two commands to remember: `make check` and `make test`. Everything else builds on them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TOOLS  := build/tools
STAMP  := $(VENV)/.installed
# Two test processes share the machine; more than that only fight over its memory bandwidth.
JOBS   ?= 2

.PHONY: setup integrations demo test check format docs build audit sbom clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "Making $(VENV) with the pinned dependencies (once; a minute or two)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Unwrite needs Python 3.11 or newer; run: make PYTHON=python3.12 ..."; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $(STAMP)

integrations: setup
	@echo "Adding what the tests of integrations need (TRL, Ray, lm-eval, datasets and others)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,integrations]'

demo: setup
	@$(BIN)/python -m unwrite.demo demo

test: setup
	@echo "Running the tests ($(JOBS) processes)"
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

check: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest tests/test_layers.py

format: setup
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: setup
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "The site is in site/index.html"

build: setup
	@$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

$(TOOLS):
	@$(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.10' 'cyclonedx-bom>=7'

# Known vulnerabilities of every pinned dependency; fails as well where they cannot be looked up.
audit: $(TOOLS)
	@$(TOOLS)/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

# What is installed, with versions and licences, as a software bill of materials (CycloneDX).
sbom: setup $(TOOLS)
	@$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file build/sbom.cdx.json $(BIN)/python
	@echo "The bill of materials is in build/sbom.cdx.json"

clean:
	rm -rf $(VENV) demo dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
