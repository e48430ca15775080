# `make demo` and `make test` need python3 (3.10 or newer) with venv, and nothing else.

PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest-jax
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test test-oldest-jax lint docs kernels bench gpu-test sanitize gpu-check clean

demo: $(VENV)/demo.done
	$(BIN)/python -m cce_cupy demo

test: $(VENV)/test.done
	$(BIN)/python -m pytest -n 2 -m "not gpu" $(PYTEST_ARGS)

# JAX's tests with the oldest version that is supported.
test-oldest-jax: $(OLDEST)/done
	$(OLDEST)/bin/python -m pytest -n 2 -m "not gpu" tests/test_jax*.py tests/test_xla*.py

lint: $(VENV)/lint.done $(VENV)/test.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/docs.done
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

# Every kernel for every architecture, without a GPU; fails on a spill or a stack in local memory.
kernels: $(VENV)/test.done
	$(BIN)/python tests/kernel_resources.py

bench: $(VENV)/test.done
	$(BIN)/python tests/benchmarks/cpu.py $(BENCH_ARGS)

# On a machine with an NVIDIA GPU, CuPy and the test requirements: its own python.
gpu-test:
	$(PYTHON) -m pytest -m gpu tests/gpu $(PYTEST_ARGS)

SANITIZER ?= compute-sanitizer

sanitize:
	for tool in memcheck racecheck initcheck synccheck; do \
	    $(SANITIZER) --tool $$tool --error-exitcode 1 $(PYTHON) tests/gpu/sanitize.py || exit 1; \
	done

# Both, and the large profile, side by side: minutes instead of an hour.
gpu-check:
	$(PYTHON) tests/gpu/side_by_side.py build/gpu-logs $(CHECK_ARGS)

# The set-up of each job is done again when the package's own requirements change.
$(VENV)/%.done: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(PIP) install --editable '.[$*]'
	@touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip

$(OLDEST)/done: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip --disable-pip-version-check --quiet install --editable '.[oldest-jax]'
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build docs/_build docs/generated *.egg-info .mypy_cache .pytest_cache .ruff_cache
