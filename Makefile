# Everything a person runs. `make quickstart` and `make test` start from a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(shell git ls-files csrc clado_ext python CMakeLists.txt pyproject.toml 2>/dev/null)

.PHONY: quickstart test lint native dev bench clean

quickstart: $(VENV)/.installed-quickstart  ## the whole pipeline on an embedded ViT
	$(BIN)/clado quickstart

test: $(VENV)/.installed-test  ## every test, on every device present
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed-%: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install ".[$*]"
	@touch $@

dev: | $(BIN)/python  ## editable install that rebuilds the native module when its sources change
	$(BIN)/python -m pip install --quiet "scikit-build-core>=0.10" pybind11 cmake ninja
	$(BIN)/python -m pip install --no-build-isolation --editable ".[dev,quickstart]"

native:  ## the native module in place, for work inside the checkout without an install
	$(BIN)/cmake -S . -B build/native -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
		-Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) $(CMAKE_ARGS)
	$(BIN)/cmake --build build/native
	$(BIN)/cmake --install build/native --prefix .

clean:
	rm -rf build dist clado_ext/*.so $(VENV)
