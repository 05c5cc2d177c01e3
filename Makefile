# `make help` lists the targets. Everything is installed in $(VENV) of this checkout; nothing outside it is changed.
VENV ?= .venv
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)

BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done

# Reference numbers and real corpora, where they lie beside the checkout; tests that need them are skipped otherwise.
ifneq ($(wildcard ../shared/parity),)
export PEFOMED_PARITY ?= $(abspath ../shared/parity)
endif
ifneq ($(wildcard ../shared/data),)
export PEFOMED_DATA ?= $(abspath ../shared/data)
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long check bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(STAMP)  ## install everything into .venv (skipped while pyproject.toml and constraints.txt are unchanged)

# The stamp holds the checkout's path: an environment copied along with a checkout is made anew.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif
$(STAMP): pyproject.toml constraints.txt .ci/install-torch
	@echo "setup: new environment in $(VENV) with $(PYTHON); this takes minutes"
	@$(PYTHON) -m venv --clear $(VENV)
	@.ci/install-torch $(BIN)/python
	@echo "setup: installing the project and its dependencies"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@echo "$(CURDIR)" > $@
	@echo "setup: done"

demo: setup  ## see the whole system work, without download, key or GPU (writes demo-output/ anew)
	@rm -rf demo-output
	$(BIN)/pefomed-ray demo

test: setup  ## all tests but the long ones
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not long"

test-long: setup  ## the long tests
	$(BIN)/python -m pytest -m long

check: setup  ## lint, formatting, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy pefomed_ray
	$(BIN)/lint-imports

bench: setup  ## run every benchmark; one that fails does not stop the others
	@failed=; found=; \
	for file in benchmarks/[!_]*.py; do \
		[ -e "$$file" ] || continue; \
		found=yes; name=$$(basename "$$file" .py); \
		echo "bench: $$name"; \
		$(BIN)/python -m "benchmarks.$$name" --json || failed="$$failed $$name"; \
	done; \
	[ -n "$$found" ] || echo "bench: there are no benchmarks yet"; \
	[ -z "$$failed" ] || { echo "bench: failed:$$failed"; exit 1; }

clean:  ## remove .venv, caches and the demo's output (runs/ stays)
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build *.egg-info demo-output
	find pefomed_ray tests -name __pycache__ -type d -prune -exec rm -rf {} +
