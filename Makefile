# make demo: answer questions about the bundled clips. make test: lint, import rules, types and the whole suite.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

KERNELS := $(wildcard csrc/* csrc/include/merv_fast/*)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow tiny-eval bench lint types clean

help: ## Show the targets.
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(VENV)/installed: pyproject.toml setup.py constraints.txt $(KERNELS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "merv_fast needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch 'setuptools>=77'
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[test]'
	touch $@

demo: $(VENV)/installed ## Ask merv-tiny about the bundled clips.
	$(BIN)/merv-fast demo

test: lint types $(VENV)/installed ## Lint, import rules, types, and every test but the slow ones.
	$(BIN)/python -m pytest -n auto --maxprocesses 8

test-slow: $(VENV)/installed ## The long checks.
	$(BIN)/python -m pytest -m slow

tiny-eval: $(VENV)/installed ## The accuracy of merv-tiny on new clips, in a few minutes.
	$(BIN)/python -m merv_fast.training.tiny eval

bench: $(VENV)/installed ## Verify and time everything: the kernels on a GPU, else what a CPU can do.
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[bench]'
	$(BIN)/python -m pytest bench/ --benchmark

lint: $(VENV)/installed ## Style and import rules.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/installed ## Types of the public API.
	$(BIN)/mypy

clean: ## Remove the environment, native libraries and caches.
	rm -rf $(VENV) merv_fast/_C*.so build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
