# `make` alone lists the targets. Each of quickstart and test sets up .venv first if that is not done yet.
SHELL := /bin/bash
VENV ?= .venv
OUT ?= runs/quickstart
BIN := $(abspath $(VENV))/bin
export VENV
export PATH := $(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-long unit lint format docs clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

install: ## create .venv and install what is missing (MEMENTO_PROFILE=cuda for GPUs)
	@scripts/install.sh

quickstart: install ## the whole pipeline on this machine, about 11 minutes: SFT, RL, evaluation, export
	$(BIN)/memento quickstart --out $(OUT)

test: lint ## everything that is checked: lint, types, unit tests, the small real pipeline
	$(BIN)/python -m pytest

unit: install ## only the tests that take seconds
	$(BIN)/python -m pytest -m "not slow and not long"

test-long: install ## what takes too long for every day: kill tests, attack floods, whole matrices
	$(BIN)/python -m pytest -m long

lint: install ## ruff and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: install ## let ruff rewrite the files
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: install ## the documentation, into build/docs (what is printed from the code is written first)
	$(BIN)/memento reference config > docs/configuration.md
	$(BIN)/memento reference metrics > docs/metrics.md
	$(BIN)/memento reference picture > docs/images/visible.svg
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove caches and build results (not .venv, not runs/)
	rm -rf build dist .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
