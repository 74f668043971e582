# Everything runs in a virtual environment that this file makes. `make help` lists the targets.
#   PYTHON=/path/to/python3   the Python for the environment (default: the first of 3.12, 3.11, 3.13 found)
#   VENV=.venv                the folder of the environment
#   EXTRAS=parity,wandb       further extras of pyproject.toml to install
#   PYTEST_ARGS="-n 2"        options of pytest
#   KILLS=100                 the number of kills of `make soak` and `make file-faults`
#   CASES=100000              the number of damaged files that `make fuzz` reads
#   FAULTS=60                 the number of file operations that fail in `make file-faults`
#
# Only `make test` leaves out the tests that are marked `slow`. Plain `pytest` runs every test that it is given.

SHELL := bash
.DEFAULT_GOAL := help

VENV ?= .venv
EXTRAS ?=
PYTEST_ARGS ?= -n 2 --dist worksteal
PYTHON ?=
KILLS ?= 100
CASES ?= 100000
FAULTS ?= 60

comma := ,
demo_installed := $(VENV)/.installed$(EXTRAS:%=-%)
test_installed := $(VENV)/.installed-test$(EXTRAS:%=-%)
bin := $(VENV)/bin

# PYTHON replaces an environment that was made with another version.
version = $(shell $(1) -c 'import sys; print(sys.version_info[:2])' 2>/dev/null)
ifneq ($(PYTHON),)
ifneq ($(call version,"$(PYTHON)"),$(call version,"$(bin)/python"))
.PHONY: $(bin)/python
endif
endif

.PHONY: help demo test test-all ci soak file-faults fuzz lint format constraints clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

demo: $(demo_installed)  ## Pretrain a small model with ReMoRA on the text of the Python installation
	@$(bin)/mora demo

test: lint  ## Lint and run the quick tests: all but those marked slow
	$(bin)/python -m pytest $(PYTEST_ARGS) -m "not slow"

test-all: lint  ## Lint and run every test (EXTRAS=parity,tpu adds torch, transformers and the TPU compiler)
	$(bin)/python -m pytest $(PYTEST_ARGS)

ci:  ## Run `make test-all` on Python 3.11 and `make test` on Python 3.12, each in its own environment
	@bash .ci/run

soak: $(test_installed)  ## Kill a small run KILLS=100 times and compare it with an undisturbed one
	$(bin)/python tests/tools/soak.py --kills $(KILLS)

file-faults: $(test_installed)  ## Kill commands at KILLS=100 file operations, let FAULTS=60 fail, compare the results
	$(bin)/python tests/tools/file_faults.py --kills $(KILLS) --failures $(FAULTS)

fuzz: $(test_installed)  ## Read CASES=100000 damaged files: configs, text, weights, manifests, ...
	$(bin)/python tests/tools/fuzz.py --cases $(CASES)

lint: $(test_installed)  ## Check style, formatting and types
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/pyright --pythonpath $(bin)/python

format: $(test_installed)  ## Sort imports, fix what ruff can fix, and format
	$(bin)/ruff check --fix
	$(bin)/ruff format

constraints:  ## Rewrite constraints.txt from the newest versions on the package index
	@python311=$$(.ci/find-python 3.11) && python312=$$(.ci/find-python 3.12) && \
	"$$python311" .ci/constraints.py "$$python311" "$$python312"

clean:  ## Remove the environments and the caches of the tools; keep runs/
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .hypothesis *.egg-info

$(bin)/python:
	@python="$(PYTHON)"; [[ -n $$python ]] || python=$$(.ci/find-python 3.12 3.11 3.13) || exit; \
	echo "Making $(VENV) with $$("$$python" --version) ($$python)"; \
	"$$python" -m venv --clear "$(VENV)"

# The test extras come on top of what the demo needs: after `make test`, `make demo` has nothing to install.
$(demo_installed): pyproject.toml constraints.txt $(bin)/python
	@.ci/install "$(bin)/python" "$(EXTRAS)"
	@touch "$(VENV)/.installed" "$@"

$(test_installed): pyproject.toml constraints.txt $(bin)/python
	@.ci/install "$(bin)/python" "test$(EXTRAS:%=$(comma)%)"
	@touch "$(VENV)/.installed" "$(VENV)/.installed-test" "$@"
