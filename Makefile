# Each target works from a bare clone with Python 3.11+ and make; the environment lives in .venv.
PYTHON ?= python3
BIN := .venv/bin
# Tests that need photographs find them here and say so when they are skipped.
ifneq ($(wildcard ../shared/data),)
export BLIP_FAST_DATA ?= $(abspath ../shared/data)
endif
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Lesser processors, as environments that lower what PyTorch, oneDNN and MKL use of this one.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
SSE := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2

.PHONY: setup demo test test-all test-processors test-oldest test-newest lint bench docs

setup: .venv/installed

.venv/installed: VERSIONS := -c tests/measured.txt
.venv-oldest/installed: VERSIONS := -c tests/oldest.txt
.venv-newest/installed: VERSIONS := --upgrade
.venv/installed: tests/measured.txt
.venv-oldest/installed: tests/oldest.txt

%/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --disable-pip-version-check $(VERSIONS) -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/blip-fast demo

test: setup
	$(TESTS)

test-all: setup
	$(TESTS) -m ''

# What must be right on every processor, as on two lesser ones.
test-processors: setup
	$(AVX2) $(TESTS) -m processor
	$(SSE) $(TESTS) -m processor

# The suite's quick part with the oldest and the newest versions; PYTHON chooses the interpreter.
test-oldest test-newest: test-%: .venv-%/installed
	$(TESTS:$(BIN)%=.venv-$*/bin%) @tests/quick.txt

lint: setup
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: setup
	$(BIN)/python -m pytest benchmarks

# The documentation as a site, in site/.
docs: setup
	$(BIN)/mkdocs build
