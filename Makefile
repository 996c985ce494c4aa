# fairserve. `make` alone lists what there is; every target sets up what it needs by itself.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=
export RAY_USAGE_STATS_ENABLED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test serve load lint bench paper chaos clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  ARGS=... is handed on: make test ARGS='-k vtc', make serve ARGS='--port 9000', make demo ARGS='--seconds 60'"

setup: $(VENV)/.installed $(VENV)/.model ## make .venv with the pinned dependencies, and fetch the model

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fairserve needs Python 3.11 or later: install it, or say make PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/pip || { echo "making $(VENV)"; "$(PYTHON)" -m venv $(VENV); }
	@echo "installing the pinned dependencies (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --quiet --editable '.[dev,bench,clients]' --constraint constraints.txt
	@touch $@

$(VENV)/.model: fairserve/engine/embedded.py $(VENV)/.installed
	@$(BIN)/fairserve models pull
	@touch $@

demo: setup ## FCFS beside VTC under a flood: a table and a chart, under 6 minutes
	@$(BIN)/python -m benchmarks.demo $(ARGS)

test: setup ## run all tests: first those without Ray, on all cores, then those on one real Ray cluster
ifeq ($(strip $(ARGS)),)
	@$(BIN)/python -m pytest -m "not cluster" --numprocesses auto --maxprocesses 8; without_ray=$$?; \
	  $(BIN)/python -m pytest -m cluster --durations 20 && exit $$without_ray
else
	@$(BIN)/python -m pytest $(ARGS)
endif

serve: setup ## serve the embedded model until Ctrl-C
	@$(BIN)/fairserve serve $(ARGS)

load: $(VENV)/.installed ## a minute of a greedy and two modest clients on what `make serve` serves
	@$(BIN)/python -m benchmarks.flood $(ARGS)

lint: $(VENV)/.installed ## ruff, mypy, and the floors
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

bench: setup ## every figure of benchmarks/README.md, in hours: ARGS=--list shows them, ARGS='--only control,slots'
	@$(BIN)/python -m benchmarks.all $(ARGS)

paper: $(VENV)/.installed ## the VTC paper's workloads, simulated, beside its published numbers: about 5 minutes
	@$(BIN)/python -m benchmarks.paper $(ARGS)

chaos: $(VENV)/.installed ## ten minutes of random kills, stops and partitions under load: nothing may be lost
	@$(BIN)/python -m benchmarks.chaos $(ARGS)

clean: ## remove .venv, caches and results; the model stays in the user's cache
	@rm -rf $(VENV) out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
