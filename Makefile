# `make demo` and `make test` do everything on a fresh clone, set-up included. PYTHON chooses the interpreter (3.11 or later).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Renewed when the requirements change.
READY := $(VENV)/.ready

BENCH := $(VENV)/bench

export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench lint types docs acceptance format clean

help:  ## Show what can be made.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 24

setup: $(READY)  ## Create .venv with everything that demo and test need (the others call it).

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hf-imitate needs Python 3.11 or later; set PYTHON=python3.11 or the like, got " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch==2.13.0
	$(PIP) install --quiet -c constraints.txt -e '.[test,plots]'
	touch $@

demo: $(READY)  ## Train a tiny imitator on real text, judge it and save it: at most 12 minutes on 2 cores.
	$(BIN)/hf-imitate demo

test: lint types  ## Check format, lint, types and all tests; print the ten slowest.
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# A type checker takes the mapped folders for packages of their own; installed, they are one package.
types: $(READY)
	rm -rf build
	$(PIP) install --quiet --no-deps --no-build-isolation --no-compile --target build/installed .
	cd build/installed && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p hf_imitate

docs: $(READY)  ## Write the pages that come from the sources, and build the guide in docs/_build; a warning is an error.
	$(BIN)/python docs/reference.py
	$(BIN)/python docs/error_page.py
	$(BIN)/python -m sphinx -E -W --keep-going -q docs docs/_build

acceptance: $(READY)  ## Run the long form of a claim, ONLY=<entry>; goes on where it was stopped, at most 60 minutes.
	$(BIN)/python -m benchmarks.acceptance $(ONLY)

bench: $(BENCH)/.ready  ## Measure cost beside TRL and lm-evaluation-harness; goes on where it was stopped.
	@# Both, even where the first misses a target.
	OMP_NUM_THREADS=1 $(BENCH)/bin/python -m benchmarks.acceptance speed; missed=$$?; \
	OMP_NUM_THREADS=1 $(BENCH)/bin/python -m benchmarks.acceptance speed_scaling && exit $$missed

# lm-evaluation-harness brings fifty packages, so it has an environment of its own, which sees those of .venv.
$(BENCH)/.ready: $(READY)
	$(BIN)/python -m venv --without-pip $(BENCH)
	$(BIN)/python -c 'import pathlib, sysconfig; site = sysconfig.get_path("purelib"); next(pathlib.Path("$(BENCH)").glob("lib/*/site-packages")).joinpath("shared.pth").write_text("import site; site.addsitedir(%r)\n" % site)'
	$(PIP) --python $(BENCH)/bin/python install --quiet -c constraints.txt lm_eval==0.4.13
	touch $@

format: $(READY)  ## Format the code and repair what ruff can.
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:  ## Remove builds, caches and the set-up; keep results.
	rm -rf $(VENV) build docs/_build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
