# Everything runs in a virtual environment made here. `make help` lists the targets.
#   PYTHON=/path/to/python3   the Python that makes it (default: the first of 3.12, 3.11, 3.13 found)
#   VENV=.venv                where it lies
#   EXTRAS=parity,wandb       further extras of pyproject.toml to install
#   KILLS=100                 how often `make soak` kills
#   CASES=100000              how many files `make fuzz` changes and reads

SHELL := bash
.DEFAULT_GOAL := help

VENV ?= .venv
EXTRAS ?=
PYTEST_ARGS ?= -n 2 --dist loadfile
PYTHON ?=
KILLS ?= 100
CASES ?= 100000

comma := ,
demo_installed := $(VENV)/.installed$(EXTRAS:%=-%)
test_installed := $(VENV)/.installed-test$(EXTRAS:%=-%)
bin := $(VENV)/bin

# An environment made with another Python than the one now asked for is made again.
version = $(shell $(1) -c 'import sys; print(sys.version_info[:2])' 2>/dev/null)
ifneq ($(PYTHON),)
ifneq ($(call version,"$(PYTHON)"),$(call version,"$(bin)/python"))
.PHONY: $(bin)/python
endif
endif

.PHONY: help demo test test-all soak fuzz lint format constraints clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

demo: $(demo_installed)  ## Pretrain a small model with ReMoRA on the text of the Python installation
	@$(bin)/mora demo

test: lint  ## Lint, then run the tests (EXTRAS=parity also against torch and transformers)
	$(bin)/python -m pytest $(PYTEST_ARGS)

test-all:  ## `make test` on each of Python 3.12 and 3.11 found (with parity on 3.11)
	@bash .ci/run

soak: $(test_installed)  ## Kill a small run KILLS=100 times, and compare it with an undisturbed one
	$(bin)/python tests/tools/soak.py --kills $(KILLS)

fuzz: $(test_installed)  ## Read CASES=100000 changed files: configs, text, weights, manifests, ...
	$(bin)/python tests/tools/fuzz.py --cases $(CASES)

lint: $(test_installed)  ## Check style, formatting and types
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/pyright --pythonpath $(bin)/python

format: $(test_installed)  ## Sort imports, mend what ruff can and format
	$(bin)/ruff check --fix
	$(bin)/ruff format

constraints:  ## Write constraints.txt anew, from the newest versions on the package index
	@python311=$$(.ci/find-python 3.11) && python312=$$(.ci/find-python 3.12) && \
	"$$python311" .ci/constraints.py "$$python311" "$$python312"

clean:  ## Remove the environments and what tools have cached; runs/ stays
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
