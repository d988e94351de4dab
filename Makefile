# specgate's commands. `make help` lists them; `make demo` and `make test` do all the set-up they need.
#   PYTHON=python3.12      the interpreter that .venv is made with (default: the first of 3.11 or 3.12 found)
#   TORCH_INDEX=URL        a package index for torch alone, such as https://download.pytorch.org/whl/cpu to
#                          spare a machine without a GPU the gigabytes of CUDA libraries
#   JOBS=2                 test processes
#   SPECGATE_NATIVE=0      leave the native core out (default where there is no C++ compiler)
#   SPECGATE_CUDA=OFF      compile it without CUDA (default: with it where a working nvcc is found)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
STAMP := $(VENV)/.specgate-setup
NATIVE := $(VENV)/.specgate-native
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

# With a C++ compiler the native core must compile: a failure is shown, and what was installed before stays.
export SPECGATE_NATIVE ?= $(if $(shell command -v $(CXX) || command -v c++ || command -v clang++),1,0)
SPECGATE_CUDA ?= AUTO
CSRC := CMakeLists.txt $(wildcard specgate/runtime/csrc/*)
# Where the editable installation keeps what it compiled (pyproject.toml), and the cmake that did it.
NATIVE_BUILD = build/native-$(shell $(BIN)/python -c 'import sys; print(sys.implementation.cache_tag)')
CMAKE_BIN = $(if $(wildcard $(BIN)/cmake),$(BIN)/)
# Two at a time would mix up one build folder.
LOCK := $(if $(shell command -v flock),flock $(VENV))

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)

.PHONY: help setup native demo test test-native test-slow sanitize lint types format docs sums smoke doctor wheel \
	lock clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  \033[1m%-11s\033[0m %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(NATIVE)  ## make .venv with exactly the versions of constraints.txt, and compile the native core
	@echo "[setup] done; see what this machine has with: $(BIN)/python -m specgate doctor"

# The packages, and specgate itself without its native core.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "specgate needs Python 3.11 or 3.12 and found neither: install one, or name it with make setup PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || { echo "[setup] $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "[setup] $(TORCH) first, so that nothing else chooses a build of it"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	@echo "[setup] the other packages of constraints.txt, and specgate itself (editable)"
	@$(PIP) nanobind scikit-build-core
	@SPECGATE_NATIVE=0 $(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

# The native core: what changed is compiled. scikit-build-core says whether this machine lacks cmake or ninja.
$(NATIVE): $(STAMP) $(CSRC)
	@echo "[native] $(if $(filter 0,$(SPECGATE_NATIVE)),left out: SPECGATE_NATIVE=0,compiling)"
	@tools="$$($(BIN)/python -m scikit_build_core.build requires --mode editable --type dynamic | tr -d '[]",')"; \
		test -z "$${tools// /}" || $(PIP) $$tools
	@$(LOCK) $(PIP) --no-build-isolation --no-deps --config-settings=cmake.define.SPECGATE_CUDA=$(SPECGATE_CUDA) \
		--editable .
	@echo "[native] $$($(BIN)/python -c 'from specgate.runtime import native; print("backend:", native.backend())')"
	@touch $@

native:  ## compile the native core anew, after a change of specgate/runtime/csrc
	@rm -f $(NATIVE)
	@$(MAKE) $(NATIVE)

demo: $(STAMP)  ## trace two real MoEs, train predictors, report (minutes, no network)
	@$(BIN)/python -m specgate.demo

test: test-native  ## every test but those marked slow or gpu
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -q --durations 10 $(ARGS)

test-native: $(NATIVE)  ## the tests of the native core that are written in C++
	@if test $(SPECGATE_NATIVE) != 0 -a -f $(NATIVE_BUILD)/CMakeCache.txt; then \
		$(CMAKE_BIN)cmake --build $(NATIVE_BUILD) --target native_tests && \
		$(CMAKE_BIN)ctest --test-dir $(NATIVE_BUILD) --output-on-failure; \
	else echo "test-native: the native core is not compiled here"; fi

sanitize:  ## the same under AddressSanitizer and UBSan, then under ThreadSanitizer
	@for kind in address thread; do \
		echo "[sanitize] $$kind"; \
		$(CMAKE_BIN)cmake -S . -B build/sanitize-$$kind -DCMAKE_BUILD_TYPE=Debug -DSPECGATE_SANITIZE=$$kind \
			--log-level=WARNING; \
		$(CMAKE_BIN)cmake --build build/sanitize-$$kind --target native_tests --parallel $(JOBS); \
		$(CMAKE_BIN)ctest --test-dir build/sanitize-$$kind --output-on-failure; \
	done

test-slow: $(NATIVE)  ## the tests that take minutes each
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

doctor: $(NATIVE)  ## what this machine has, and what to do about what it has not
	@$(BIN)/python -m specgate doctor

wheel: $(NATIVE)  ## dist/specgate-*.whl
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist

lock:  ## resolve constraints.txt anew (network; the one way that file changes)
	@rm -rf $(VENV)-lock && $(PYTHON) -m venv $(VENV)-lock
	@$(VENV)-lock/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	@$(VENV)-lock/bin/python -m pip install --quiet '$(TORCH)' cmake ninja
	@SPECGATE_NATIVE=0 $(VENV)-lock/bin/python -m pip install --quiet '$(TORCH)' '.[dev]'
	@{ sed -n '/^#/p' constraints.txt; \
	   $(VENV)-lock/bin/python -m pip freeze --exclude specgate | sed 's/+cpu$$//'; } > constraints.txt.new
	@mv constraints.txt.new constraints.txt && rm -rf $(VENV)-lock
	@echo "constraints.txt written: read the difference, then make test"

clean:  ## remove caches and builds (keeps data/, outputs/ and .venv)
	@rm -rf build dist _skbuild $(NATIVE) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv as well
	@rm -rf $(VENV)
