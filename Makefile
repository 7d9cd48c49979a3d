# Two commands stand between a clone and a result: make search, make test.
PYTHONS := python3.13 python3.12 python3.11
# The newest that is there, runs (a version manager's stand-in may not) and can make environments.
PYTHON ?= $(shell for name in $(PYTHONS); do \
  $$name -c 'import ensurepip, venv' >/dev/null 2>&1 && echo $$name && break; done)
VENV := .venv
BIN := $(VENV)/bin
N_TRIALS ?= params.yaml
PRESET ?= params.yaml
SET ?= params.yaml
TORCH_INDEX ?=
# What is hardly ever imported is compiled when it is: two fifths of all source.
SELDOM := /tests?/|/transformers/models/|/torch/(testing|_inductor)/|/sympy/physics/|/pygments/lexers/|/lm_eval/tasks/
SELDOM := $(SELDOM)|/(asyncssh|databricks|fontTools|graphql|mypyc?|nltk|pip|plotly|prompt_toolkit|setuptools)/
INSTALL = python -m pip install --quiet --no-compile --disable-pip-version-check
COMPILE = python -m compileall -qq -x '$(SELDOM)' $(VENV)/lib
export PATH := $(CURDIR)/$(BIN):$(PATH)
ifeq ($(LOGNAME)$(USER),)
# In a container the user may have no name; MLflow and DVC ask for one.
export LOGNAME := $(shell id -un 2>/dev/null || echo uid-$$(id -u))
endif

.PHONY: search test lint fmt ui bench doctor check setup workers services team clean help
.DEFAULT_GOAL := help

search: setup ## the main job, from the model to the registry; PRESET=llama-7b N_TRIALS=30 SET="prune.ratios=0.3"
	mlflow run . -e search --env-manager=local --experiment-name qpruner \
	  -P preset=$(PRESET) -P n_trials=$(N_TRIALS) -P set="$(SET)"

test: setup style ## lint, types and tests (no network, no GPU)
	@mypy & types=$$!; \
	OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder; tests=$$?; \
	wait $$types && exit $$tests

lint: setup style ## ruff and mypy
	mypy

.PHONY: style
style: setup
	ruff check pipeline tests benchmarks
	ruff format --check pipeline tests benchmarks

fmt: setup ## format the code
	ruff check --fix pipeline tests benchmarks
	ruff format pipeline tests benchmarks

bench: setup ## what a trial costs beside the plain way; NAMES="evaluation query" measures only those
	python -m benchmarks.bench $(NAMES)

ui: setup ## the MLflow UI on http://127.0.0.1:5000
	@python -m pipeline ui

check: setup ## all faults of params.yaml at once; PRESET=llama-7b or SET="prune.ratios=0.3" checks those
	@python -m pipeline check --preset $(PRESET) --set "$(SET)"

doctor: | python ## what this machine is, and how long make search will take
	@$$(command -v $(BIN)/python || echo $(PYTHON)) -m pipeline doctor

setup: $(VENV)/installed ## the environment; TORCH_INDEX=<index of CPU builds> saves 5 GB where no GPU is

# 6.1 GB with PyTorch's build for CUDA, of which at least 1.65 GB are downloaded. PyTorch comes first: pip uses one core,
# and another one compiles it while the rest is installed.
$(VENV)/installed: requirements.txt requirements-dev.txt | python
	@[ -n "$(TORCH_INDEX)" ] || command -v nvidia-smi >/dev/null || echo "No NVIDIA GPU here: TORCH_INDEX=<address of \
	PyTorch's index of CPU builds> would save most of 6.1 GB (see README)"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") $$(grep '^torch==' requirements.txt)
	@$(COMPILE) & $(INSTALL) -r requirements.txt -r requirements-dev.txt; installed=$$?; wait; exit $$installed
	$(COMPILE) -j 0 || true # on all cores; some packages ship what is no Python
	touch $@

workers: setup ## Ray, for search.workers on several GPUs or machines (docs/cluster.md); 75 MB
	$(INSTALL) -r requirements-workers.txt

services: setup ## what a team's shared services need beside PostgreSQL (docs/cluster.md)
	$(INSTALL) -r requirements-services.txt

team: workers services ## tests with Ray and with a team's services, which make test skips where these are missing
	python -m pytest -q tests/test_workers.py tests/services

.PHONY: python
python:
	@[ -n "$(PYTHON)" ] || { echo "no Python found that can make environments: install one of $(PYTHONS) with its venv \
	module, or name it: make setup PYTHON=<its path>" >&2; exit 2; }

clean: ## remove what the pipeline made; keeps .venv, DVC's cache and the MLflow store
	rm -rf artifacts reports data/alpaca.jsonl data/benchmarks

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12
	@echo
	@echo "Presets: $(basename $(notdir $(wildcard presets/*.yaml)))"
	@echo "mlflow, dvc and python in $(BIN) need it on the PATH: source $(BIN)/activate"
