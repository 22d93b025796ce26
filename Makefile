# `make demo` and `make test` need Python 3.11 or newer, make and a package index; nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One thread for each test process: on few cores that is faster than threads that compete.
TEST_THREADS ?= 1
TEST_PROCESSES ?= logical

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## Make .venv from constraints.txt, if it isn't there

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "expected Python 3.11 or newer, got $$($(PYTHON) --version 2>&1). Name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(READY)

demo: $(READY) ## Patch a real checkpoint, compare it, save it, undo it; draw larger pictures
	$(BIN)/python -m examples.demo

test: lint types ## Lint, types and tests
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

lint: $(READY) ## ruff check and ruff format --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## mypy, on the package as it is installed
	$(BIN)/python .ci/types.py

clean: ## Remove the environment and everything that was built
	rm -rf $(VENV) .build build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
