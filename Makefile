# Needs git, make and Python 3.11 or newer; sets up .venv by itself.
.DEFAULT_GOAL := help
.PHONY: help repro test test-lowest lint lock mlflow

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
  $$python -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$python && break; done)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
READY := .venv/.ready
ALL := '.[baselines,dev,onnx,pipeline,report,zoo]'
# what `make test-lowest` tests the oldest accepted versions of, and where it puts them
OLD := click|pandas|pydantic
OLDEST := build/lowest

help: ## show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# a cell a core, a thread each: faster than one cell on all cores. A GPU takes one at a time
JOBS ?= $(if $(shell grep '^device: cpu' params.yaml),$(shell getconf _NPROCESSORS_ONLN),1)
THREADS := $(if $(filter-out 1,$(JOBS)),OMP_NUM_THREADS=1)

repro: $(READY) ## run the pipeline of params.yaml, JOBS cells at once, and print its tables
	dvc repro prepare
	nemo cells --dvc | $(THREADS) xargs -P $(JOBS) -L 1 dvc --wait-for-lock repro --single-item
	dvc repro
	nemo report --show

test: $(READY) ## run the tests
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile

test-lowest: $(READY) ## test params, commands and reports with the oldest click, pandas and pydantic
	mkdir -p build
	grep -ohE '"($(OLD))>=[0-9.]+' pyproject.toml | sed 's/"//; s/>=/==/' | tee $(OLDEST).txt
	grep -vE '^($(OLD)|numpy)' constraints.txt >$(OLDEST)-others.txt
	rm -rf $(OLDEST)
	python -m pip install -q --no-warn-conflicts --target $(OLDEST) -c $(OLDEST)-others.txt \
	  -r $(OLDEST).txt 'numpy<2' # which pandas 2.1 was built for
	PYTHONPATH=$(OLDEST) OMP_NUM_THREADS=1 python -m pytest -n 2 tests/test_config.py \
	  tests/test_cli.py tests/test_readme.py tests/report tests/test_tracking.py

lint: $(READY) ## check style and types
	ruff check
	ruff format --check
	mypy

mlflow: $(READY) ## publish the results to MLflow, print where to see them, and open its UI on port 5000
	nemo publish || echo "the UI shows what was published before"
	@case "$$MLFLOW_TRACKING_URI" in \
	http*) ;; \
	*) echo "the addresses answer once the UI has started; Ctrl-C ends it"; \
	MLFLOW_DISABLE_TELEMETRY=true exec mlflow ui --workers 1 \
	  --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}" ;; \
	esac

lock: $(READY) ## renew constraints.txt: the newest versions that pyproject.toml allows
	python -m pip install -q --upgrade --upgrade-strategy eager -e $(ALL)
	(head -n 1 constraints.txt; python -m pip freeze --exclude-editable --exclude setuptools | \
	  sed 's/+.*//' | grep -vE '^(cuda|nvidia|triton)\b') >.constraints.partial
	mv .constraints.partial constraints.txt

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=..." >&2; exit 1; }
	test -d .venv || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -c constraints.txt -e $(ALL)
	touch $@
