# Needs git, make and Python 3.11 or newer; sets up .venv by itself.
.DEFAULT_GOAL := help
.PHONY: help repro test lint mlflow

PYTHON ?= $(shell command -v python3.13 || command -v python3.12 || command -v python3.11 || command -v python3)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
READY := .venv/.ready

help: ## show this
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

repro: $(READY) ## run the pipeline of params.yaml and print its tables
	dvc repro
	nemo report --show

test: $(READY) ## run the tests
	OMP_NUM_THREADS=1 python -m pytest -n 2

lint: $(READY) ## check style and types
	ruff check
	ruff format --check
	mypy

mlflow: $(READY) ## publish the results to MLflow and open its UI on port 5000
	nemo publish
	MLFLOW_DISABLE_TELEMETRY=true mlflow ui --backend-store-uri $${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with make PYTHON=..."; exit 1; }
	test -d .venv || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -e '.[dev,pipeline,report]'
	touch $@
