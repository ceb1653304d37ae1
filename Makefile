# Everything runs in .venv, which is made on first use. `make` alone lists the targets.
#   PYTHON=python3.12    interpreter for .venv (3.11 or newer)
#   PYTEST_ARGS="-k x"   more arguments for pytest
#   BASE=main BENCH_ARGS="--only step_speed"   of `make bench-compare`
#   CUDA=13.0 TORCH=2.13.0 PYTHON=3.12 EXTRAS=s3   of `make docker-image`, see Dockerfile
#   IMAGE=toolkit        name of that image

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
IMAGE ?= toolkit

.PHONY: help quickstart test checks style lint lint-check type-check docs bench bench-compare soak docker-image clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   install, then train a small model on this machine (minutes)"
	@echo "make test         install with dev extras, then run the tests (GPU tests too, if there is one)"
	@echo "make style        let ruff format the code and mend what it can"
	@echo "make lint         lint-check (ruff check, ruff format --check), then type-check (mypy)"
	@echo "make checks       lint, then test: what has to pass before a change is proposed"
	@echo "make docs         build the docs site into build/docs (open build/docs/index.html)"
	@echo "make bench        run every benchmark; each prints a table"
	@echo "make bench-compare BASE=main   short benchmarks of that revision and of this tree, in turns"
	@echo "make soak         run the slow tests"
	@echo "make docker-image CUDA=13.0   build an image that trains (CUDA=cpu: without GPUs)"
	@echo "make clean        remove caches and build output (.venv, data and runs stay)"

quickstart: .venv/.installed
	$(BIN)/accelerate launch toolkit train quickstart

test: .venv/.installed-dev
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 $(PYTEST_ARGS)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS) || [ $$? -eq 5 ]; \
	fi

checks: lint test

style: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: lint-check type-check

lint-check: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type-check: .venv/.installed-dev
	$(BIN)/mypy

docs: .venv/.installed-dev
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs

bench: .venv/.installed
	@set -e; for file in $(filter-out benchmarks/compare.py,$(wildcard benchmarks/[a-z]*.py)); do \
		echo "== $$file"; TOOLKIT_MEASURE=0 $(BIN)/python $$file; echo; \
	done

bench-compare: .venv/.installed
	$(if $(BASE),,$(error name a revision: make bench-compare BASE=main))
	TOOLKIT_MEASURE=0 $(BIN)/python benchmarks/compare.py --base $(BASE) $(BENCH_ARGS)

soak: .venv/.installed-dev
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# Only what the command line says: PYTHON is elsewhere the name of an interpreter.
docker-image:
	docker build -t $(IMAGE) $(foreach name,CUDA TORCH PYTHON EXTRAS,$(if \
		$(findstring command,$(origin $(name))),--build-arg $(name)=$(patsubst python%,%,$($(name))))) .

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find toolkit tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv

# torch goes first: it decides which build (CPU, CUDA) the rest is resolved against, and
# DeepSpeed's set-up looks at it.
.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing into .venv (some minutes the first time)"
	$(PIP) torch
	$(PIP) -e .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) -e '.[dev]'
	@touch $@
