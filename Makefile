# Each target works from a bare clone with Python 3.11+ and make; the environment lives in .venv.
PYTHON ?= python3
BIN := .venv/bin
# Tests that need photographs find them here and say so when they are skipped.
ifneq ($(wildcard ../shared/data),)
export BLIP_FAST_DATA ?= $(abspath ../shared/data)
endif
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: setup demo test test-all lint bench

setup: .venv/installed

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/blip-fast demo

test: setup
	$(TESTS)

test-all: setup
	$(TESTS) -m ''

lint: setup
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: setup
	$(BIN)/python -m pytest benchmarks
