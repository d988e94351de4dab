# specgate's commands. `make help` lists them; `make demo` and `make test` do all the set-up they need.
#   PYTHON=python3.12      the interpreter that .venv is made with (default: the first of 3.11 or 3.12 found)
#   TORCH_INDEX=URL        a package index for torch alone, such as https://download.pytorch.org/whl/cpu to
#                          spare a machine without a GPU the gigabytes of CUDA libraries
#   JOBS=2                 test processes

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
STAMP := $(VENV)/.specgate-setup
BIN := $(VENV)/bin
JOBS ?= 2
TORCH_INDEX ?=
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && { echo $$p; break; }; done)

# Two threads per process at most: the commands below run several processes at once.
export OMP_NUM_THREADS ?= 2
# Threads that wait give their core away: a spinning one makes training four times slower on a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
export WANDB_MODE ?= offline

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)

.PHONY: help setup demo test test-slow lint types format docs sums smoke doctor wheel lock clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  \033[1m%-10s\033[0m %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with exactly the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "specgate needs Python 3.11 or 3.12 and found neither: install one, or name it with make setup PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || { echo "[setup] $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "[setup] $(TORCH) first, so that nothing else chooses a build of it"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	@echo "[setup] the other packages of constraints.txt, and specgate itself (editable)"
	@$(PIP) scikit-build-core
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@
	@echo "[setup] done; see what this machine has with: $(BIN)/python -m specgate doctor"

demo: $(STAMP)  ## trace two real MoEs, train predictors, report (minutes, no network)
	@$(BIN)/python -m specgate.demo

test: $(STAMP)  ## every test but those marked slow or gpu
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -q --durations 10 $(ARGS)

test-slow: $(STAMP)  ## the tests that take minutes each
	@$(BIN)/python -m pytest -m "slow and not gpu" -q $(ARGS)

lint: $(STAMP)  ## ruff: style and format of everything
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo "formatting differs: run make format"; exit 1; }
	@echo "lint: clean"

types: $(STAMP)  ## mypy over specgate and the entry points
	@$(BIN)/mypy

format: $(STAMP)  ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

docs: $(STAMP) sums  ## write the generated parts of README.md and docs/ anew
	@$(BIN)/python -m specgate.report.readme
	@$(BIN)/python -m specgate.report.results

sums:  ## write the checksums of the bundled models and text anew
	@cd specgate/moe/reference && find olmoe_ref switch_ref text -type f ! -name '*.md' ! -name '*.py*' \
		| LC_ALL=C sort | xargs sha256sum > SHA256SUMS

smoke: $(STAMP)  ## two training steps of every predictor on a tiny trace
	@$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_experiments.py -k "smoke" $(ARGS)

doctor: $(STAMP)  ## what this machine has, and what to do about what it has not
	@$(BIN)/python -m specgate doctor

wheel: $(STAMP)  ## dist/specgate-*.whl
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist

lock:  ## resolve constraints.txt anew (network; the one way that file changes)
	@rm -rf $(VENV)-lock && $(PYTHON) -m venv $(VENV)-lock
	@$(VENV)-lock/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	@$(VENV)-lock/bin/python -m pip install --quiet '$(TORCH)' '.[dev]'
	@{ sed -n '/^#/p' constraints.txt; \
	   $(VENV)-lock/bin/python -m pip freeze --exclude specgate | sed 's/+cpu$$//'; } > constraints.txt.new
	@mv constraints.txt.new constraints.txt && rm -rf $(VENV)-lock
	@echo "constraints.txt written: read the difference, then make test"

clean:  ## remove caches and builds (keeps data/, outputs/ and .venv)
	@rm -rf build dist _skbuild .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv as well
	@rm -rf $(VENV)
