# make demo: the whole story, from nothing to runs/demo/index.html. `make help` lists the rest.
#
#   make demo NAME=mine                       another run folder, runs/mine
#   make demo RUN_ARGS="-p seed 1"            anything `eas-kit run` takes
#   make test PYTEST_ARGS="-k merging -x"     anything pytest takes
#   make test PYTEST_ARGS="-n 2 --dist loadfile"     in two processes, as .ci/run does
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#                                             torch's CPU build, where pip would fetch several GB of CUDA

PYTHON ?= python3
VENV ?= .venv
NAME ?= demo
RUN_ARGS ?=
PIP_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
# One pip line for all: constraints.txt keeps every version at the tested one. torch goes first and by its exact
# version, since a range that admits a newer release makes pip fetch that one.
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
# transformers changes names between minor versions, so its oldest and newest supported ones are tested: the lower bound
# of pyproject.toml, and this one. What `make test` does not install stands before the environment's on the path.
OLDEST_TRANSFORMERS := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
NEWEST_TRANSFORMERS := 5.24.0
VERSION_TESTS := $(wildcard $(patsubst %,tests/test_%.py,conformance load_model merging model placement prompt saving \
  sites_and_slots static tiny_model training))
BASE_STAMP := $(VENV)/.installed-base
TEST_STAMP := $(VENV)/.installed-test
BROWSER_STAMP := $(VENV)/.installed-browser

NOTEBOOKS = $(wildcard notebooks/*.ipynb)
STRIP := --keep-id --extra-keys "metadata.papermill metadata.widgets cell.metadata.papermill cell.metadata.execution"

.PHONY: help demo resume test test-versions test-browser test-all lab lint format navigation notebooks doctor clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

demo: $(BASE_STAMP)  ## install into .venv, run every notebook, leave runs/demo/index.html
	$(BIN)/eas-kit run --out runs/$(NAME) $(RUN_ARGS)

resume: $(BASE_STAMP)  ## go on with a demo that was stopped
	$(BIN)/eas-kit run --out runs/$(NAME) --resume $(RUN_ARGS)

# Models this small gain nothing from a second thread, and on a machine that does something else as well the threads
# wait for each other. For a real model: make demo OMP_NUM_THREADS=16 RUN_ARGS="-p model ..."
demo resume notebooks test test-versions test-browser test-all: export OMP_NUM_THREADS ?= 1

test: $(TEST_STAMP)  ## unit tests, conformance tests and every notebook with small parameters
	$(BIN)/python -m pytest -m "not browser and not gpu" $(PYTEST_ARGS)

test-versions: $(TEST_STAMP)  ## the model's tests with the oldest and the newest supported transformers
	PYTEST_ARGS="$(PYTEST_ARGS)" PIP_ARGS="$(PIP_ARGS)" tests/versions.sh $(VENV) \
	  "$(OLDEST_TRANSFORMERS) $(NEWEST_TRANSFORMERS)" $(VERSION_TESTS)

test-browser: $(BROWSER_STAMP)  ## the tests that click in a real JupyterLab (needs chromium)
	@$(BIN)/python tests/lab.py  # says what to do where there is no chromium
	$(BIN)/python -m pytest -m browser $(PYTEST_ARGS)

test-all: $(BROWSER_STAMP)  ## both
	$(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS)

lab: $(BASE_STAMP)  ## JupyterLab, opened on the first notebook
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" notebooks/00_start_here.ipynb

lint: $(TEST_STAMP)  ## ruff on code and notebooks; no outputs in the notebooks' sources
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(NOTEBOOKS),$(BIN)/nbstripout --verify $(STRIP) $(NOTEBOOKS))

format: $(TEST_STAMP)  ## mend what `make lint` can mend, and the links between notebooks
	$(BIN)/python -m eas_kit.navigation
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(NOTEBOOKS),$(BIN)/nbstripout $(STRIP) $(NOTEBOOKS))

navigation: $(BASE_STAMP)  ## links between notebooks and the contents in the first, from the files that there are
	$(BIN)/python -m eas_kit.navigation

notebooks: $(BASE_STAMP)  ## executed copies for readers, in notebooks/rendered
	env -u EAS_KIT_DISPLAY $(BIN)/eas-kit run --out runs/rendered $(RUN_ARGS)
	$(BIN)/python -m eas_kit.rendered runs/rendered notebooks/rendered

doctor: $(BASE_STAMP)  ## versions, device, memory, missing parts
	$(BIN)/eas-kit doctor

clean:  ## remove the environment, caches and build leftovers (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BASE_STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V). Try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the tested versions into $(VENV) (about two minutes) ..."
	$(PIP_INSTALL) $(TORCH)
	$(PIP_INSTALL) -e .
	@touch $@

$(TEST_STAMP): $(BASE_STAMP)
	$(PIP_INSTALL) -e ".[test]"
	@touch $@

$(BROWSER_STAMP): $(TEST_STAMP)
	$(PIP_INSTALL) -e ".[test,browser]"
	@touch $@
