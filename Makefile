# The verbs. Each makes .venv by itself; nothing is installed outside the checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
CXX_SOURCES := $(shell git ls-files 'csrc/*.h' 'csrc/*.cc' 'tests/csrc/*.h' 'tests/csrc/*.cc' \
	'include/*.h' 'examples/*.cc' 'tests/cpp/*.cc')

.PHONY: build demo test test-long bench bench-serving bench-features lint format gpu clean

build: $(STAMP)

NATIVE := pyproject.toml CMakeLists.txt $(shell git ls-files csrc include)
PIP := PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --quiet --disable-pip-version-check

# Says what the machine lacks, then makes the environment that builds.
define prepare
	@command -v g++ >/dev/null || { echo "g++ is missing: apt-get install g++"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "venv is missing: apt-get install python3-venv"; exit 1; }
	@test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h" || { echo "Python.h is missing: apt-get install python3-dev"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "scikit-build-core>=1.0" "pybind11>=3.1" "cmake>=3.22" ninja "setuptools>=70.1" wheel
endef

$(STAMP): $(NATIVE)
	$(prepare)
	$(PIP) --no-build-isolation -e '.[test]'
	@touch $(STAMP) $(DEMO_STAMP)

# The demo needs a part of what the tests need.
$(DEMO_STAMP): $(NATIVE)
	$(prepare)
	$(PIP) --no-build-isolation -e '.[demo]'
	@touch $(DEMO_STAMP)

demo: $(DEMO_STAMP)
	$(BIN)/penstock demo

# Servers and builds one after the other; then the rest, a file at a time on each core.
test: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m "not long" --ignore tests/engine \
	  --cov --cov-report= --cov-fail-under=0
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m "not long" -n auto --dist loadfile tests/engine \
	  --cov --cov-append --cov-report=term:skip-covered

test-long: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m long --timeout 1800 -n auto --dist worksteal

# Peers that pip cannot install are named and left out.
bench: $(STAMP)
	for peer in onnxruntime onnxmltools tl2cgen cachetools cachebox; do \
	  $(BIN)/pip install --quiet --disable-pip-version-check $$peer || echo "$$peer: cannot be installed"; done
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python bench/run.py

# Beside its peers, each in an environment of its own under build/peers; QUICK=1 takes about two minutes.
bench-serving: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check onnxruntime onnxmltools || echo "onnxruntime: cannot be installed"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python bench/serving/bench.py $(if $(QUICK),--quick)
	$(BIN)/python bench/tables.py

# The feature store beside its peers, each in an environment of its own; QUICK=1 takes about two minutes.
bench-features: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python bench/features/bench.py $(if $(QUICK),--quick)
	$(BIN)/python bench/tables.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy engine/penstock kernels/penstock_kernels
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# The kernels on an NVIDIA GPU: needs no build, only numpy, CuPy, Triton and pytest.
gpu:
	@PYTHON="$(PYTHON)" VENV="$(VENV)" bench/gpu/run.sh

clean:
	rm -rf $(VENV) build demo-run .pytest_cache .mypy_cache .ruff_cache
