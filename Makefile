# Two commands stand between a clone and a result: make search, make test.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
N_TRIALS ?= params.yaml
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: search test lint fmt ui bench setup clean help
.DEFAULT_GOAL := help

search: setup ## the main job: fetch, prune, quantize, search, build, register, report
	mlflow run . -e search --env-manager=local --experiment-name qpruner -P n_trials=$(N_TRIALS)

test: setup lint ## lint, types and tests (no network, no GPU)
	OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile

lint: setup ## ruff and mypy
	ruff check pipeline tests benchmarks
	ruff format --check pipeline tests benchmarks
	mypy pipeline

fmt: setup ## format the code
	ruff check --fix pipeline tests benchmarks
	ruff format pipeline tests benchmarks

bench: setup ## what a trial costs beside the plain way; NAMES="evaluation query" measures only those
	python -m benchmarks.bench $(NAMES)

ui: setup ## the MLflow UI on http://127.0.0.1:5000
	mlflow ui --host 127.0.0.1 --backend-store-uri $${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}

setup: $(VENV)/installed ## the virtual environment with the pinned requirements

$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $@

clean: ## remove what the pipeline made; keeps .venv, DVC's cache and the MLflow store
	rm -rf artifacts reports data/alpaca.jsonl data/benchmarks

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12
