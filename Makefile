# Everything a person runs. `make quickstart` and `make test` start from a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := $(shell git ls-files csrc clado_ext/bindings CMakeLists.txt pyproject.toml 2>/dev/null)

.PHONY: help quickstart test lint docs dev native bench sanitize wheel gpu-check clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

quickstart: $(VENV)/.installed-quickstart  ## the whole pipeline on an embedded, trained ViT
	$(BIN)/clado quickstart

test: $(VENV)/.installed-test  ## every test, on every device present
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs  ## the documentation as HTML in build/docs; warnings are errors
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

bench: $(VENV)/.installed-test  ## microbenchmarks of the kernels beside their ceilings and rivals
	$(BIN)/python -m bench

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# Editable, so that what runs is what the checkout holds; built again when the native side changes, not for further extras.
BUILT := $(VENV)/.built
$(VENV)/.installed-%: $(NATIVE) | $(BIN)/python
	@if [ -e $(BUILT) ] && [ -z "$$(find $(NATIVE) -newer $(BUILT))" ]; then \
		$(BIN)/python -m pip install "clado[$*]"; \
	else \
		$(PYTHON) csrc/build_backend.py && $(BIN)/python -m pip install --editable ".[$*]" && touch $(BUILT); \
	fi
	@touch $@

dev: | $(BIN)/python  ## editable install whose native module rebuilds itself at import
	$(BIN)/python -m pip install --quiet "scikit-build-core>=0.10" pybind11 cmake ninja
	$(BIN)/python -m pip install --no-build-isolation --config-settings=editable.rebuild=true --editable ".[dev]"
	@touch $(BUILT) $(VENV)/.installed-quickstart $(VENV)/.installed-test $(VENV)/.installed-dev

native:  ## the native module in place, without an install (PYTHONPATH=.:python)
	$(BIN)/cmake -S . -B build/native -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
		-Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) $(CMAKE_ARGS)
	$(BIN)/cmake --build build/native
	$(BIN)/cmake --install build/native --prefix .

UNDER_SANITIZERS := LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1

sanitize: $(VENV)/.installed-dev  ## CPU kernels, and CUDA kernels run on the CPU, under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
		-Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) -DCLADO_CUDA=OFF -DCLADO_WERROR=ON -DCLADO_SANITIZE=address,undefined
	$(BIN)/cmake --build build/sanitize
	$(UNDER_SANITIZERS) $(BIN)/python tests/sanitize.py build/sanitize/_native*.so
	kernels=$$($(BIN)/python tests/cuda_on_cpu/build.py --sanitize) && $(UNDER_SANITIZERS) $(BIN)/python tests/sanitize.py $$kernels

wheel:  ## one wheel with CPU and CUDA kernels in dist/, repaired for manylinux, tried in a clean environment
	$(PYTHON) tests/wheel.py

gpu-check:  ## build, test, sanitize and time the CUDA kernels with the Python that is there; fails without a GPU
	$(PYTHON) bench/gpu_check.py

clean:
	rm -rf build dist clado_ext/*.so $(VENV)
