# Each target sets up .venv first; nothing but Python 3.11+, git and make is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup repro test test-long chaos ui lint format bench lock audit schema clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: $(STAMP) ## create .venv and install requirements.lock into it

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; name one: make PYTHON=python3.12 ...")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "installing requirements.lock (a few minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# Checked again only when what is checked, or who checks it, is newer than the last check that passed.
$(VENV)/.checked: params.yaml params.schema.json $(wildcard src/anneal/*.py src/anneal/*/*.py) | $(STAMP)
	@anneal check --brief
	@anneal prune
	@touch $@

repro: $(STAMP) $(VENV)/.checked ## train: run what params.yaml, the data or the code made out of date
	@dvc repro
	@anneal summary

test: $(STAMP) ## run the tests (some ten minutes on 2 cores)
	@python -m pytest -m "not long" -n 4 --dist loadgroup --no-loadscope-reorder

test-long: $(STAMP) ## run the long tests too
	@python -m pytest

chaos: $(STAMP) ## kill training runs at all moments; each must end as if undisturbed (under 15 minutes on 2 cores)
	@python -m tests.chaos

ui: $(STAMP) ## open MLflow on http://127.0.0.1:5000
	@anneal ui

lint: $(STAMP) ## ruff and mypy
	@ruff check .
	@ruff format --check .
	@mypy

format: $(STAMP) ## let ruff mend what it can
	@ruff check --fix .
	@ruff format .

bench: $(STAMP) ## print the performance ratios of docs/performance.md
	@python bench/loader.py
	@python bench/step.py
	@python bench/dynamics.py
	@python bench/optimizers.py
	@python bench/norms.py
	@python bench/checkpoint.py
	@python bench/tracking.py

schema: $(STAMP) ## write params.schema.json and docs/params.md anew from the section classes
	@python -m anneal.recipe
	@python -m anneal.reference

# torch's own metadata pins its CUDA packages exactly; left out here, a CPU build of torch stays one. pip stays what .venv has.
lock: $(STAMP) ## resolve pyproject.toml anew into requirements.lock
	@$(BIN)/python -m pip install --quiet uv
	@$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --quiet --no-header --no-annotate $(LOCKFLAGS) \
	  | grep -vE '^(nvidia-|cuda-|triton|pip==)' > requirements.lock.tmp
	@mv requirements.lock.tmp requirements.lock

# The lock names every package, so that pip need not resolve anything; strict, since one that cannot be looked up proves nothing.
AUDIT := pip-audit --requirement requirements.lock --no-deps --disable-pip --strict --progress-spinner off --desc off
audit: $(STAMP) ## look requirements.lock up in the database of known vulnerabilities
	@$(AUDIT) $(AUDITFLAGS) 2>$(VENV)/audit.log && tail -n 1 $(VENV)/audit.log || { \
	  grep '^Found ' $(VENV)/audit.log \
	  || echo "audit: not done, the database of vulnerabilities gave no answer: $$(tail -n 1 $(VENV)/audit.log)" >&2; \
	  exit 1; }

clean: ## remove .venv and caches; data, models, reports and MLflow stay
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build
