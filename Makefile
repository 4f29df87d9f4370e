# Needs git, make and Python 3.11 or newer; sets up .venv by itself.
.DEFAULT_GOAL := help
.PHONY: help repro test lint mlflow

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
  $$python -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$python && break; done)
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
	@case "$$MLFLOW_TRACKING_URI" in \
	http*) echo "published; the UI is at $$MLFLOW_TRACKING_URI" ;; \
	*) MLFLOW_DISABLE_TELEMETRY=true exec mlflow ui \
	  --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}" ;; \
	esac

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=..." >&2; exit 1; }
	test -d .venv || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -e '.[baselines,dev,onnx,pipeline,report]'
	touch $@
