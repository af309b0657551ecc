# One command each. `make help` lists them. Environments are made once and used offline from then on; they are brought
# up to date when a file that says what to install has changed.
PYTHON      ?= python3
PYTHON_NEXT ?= python3.12
VENV        ?= .venv
BENCH_VENV  ?= .venv-bench
NVCC_VENV   ?= .venv-nvcc
CONSTRAINTS ?= constraints.txt
DEMO_FLAGS  ?=
PYTEST      ?= $(VENV)/bin/python -m pytest
BENCH       ?= $(wildcard benchmarks/bench_*.py)

WHAT := setup.cfg setup.py pyproject.toml $(CONSTRAINTS) $(wildcard pyro_ssm/ops/csrc/*.* pyro_ssm/ops/csrc/cuda/*)
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-fast doctest slow tutorials ops cuda-check docs lint arviz-next bench-env bench clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

demo: $(VENV)/.has-run  ## install, fit a deep state-space model to bundled data, write the results to demo_output/
	$(VENV)/bin/python -m pyro_ssm demo $(DEMO_FLAGS)

test: $(VENV)/.has-test  ## install, run everything that must pass: unit tests, doctests, tutorials
	$(PYTEST)

test-fast: $(VENV)/.has-test  ## unit tests and doctests, without the tutorials
	$(PYTEST) -m "not tutorial"

doctest: $(VENV)/.has-test  ## the examples in the docstrings
	$(PYTEST) pyro_ssm

slow: $(VENV)/.has-test  ## the long tests that `make test` leaves out
	$(PYTEST) --slow -m slow

tutorials: $(VENV)/.has-test  ## execute the notebooks; their claims are assertions
	$(PYTEST) tests/test_tutorials.py

ops: $(VENV)/.has-test  ## build the compiled operators in place; `make test` and `make demo` do so too, if a compiler is there
	PYRO_SSM_BUILD=require $(VENV)/bin/python setup.py -q build_ext --inplace --force
	$(VENV)/bin/python -m pyro_ssm info

cuda-check: $(NVCC_VENV)/.has-nvcc  ## compile the CUDA sources for sm_80 and sm_90, without a GPU; a warning or a spill is an error
	$(NVCC_VENV)/bin/python tests/cuda_check.py

docs: $(VENV)/.has-dev  ## build the documentation into docs/_build/html; a warning is an error
	$(VENV)/bin/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

lint: $(VENV)/.has-dev  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

arviz-next: .venv-arviz1/.has-arviz $(VENV)/.has-test  ## the export under ArviZ 1.x, in an environment without torch
	$(PYTEST) tests/diagnostics

.venv-arviz1/.has-arviz:
	$(PYTHON_NEXT) -m venv .venv-arviz1
	.venv-arviz1/bin/python -m pip install --quiet --disable-pip-version-check "arviz>=1" h5netcdf h5py
	touch $@

bench-env: $(BENCH_VENV)/.has-bench  ## the environment of the benchmarks: this package beside its peers

bench: $(BENCH_VENV)/.has-bench  ## run the benchmarks, or those named in BENCH=...
	@set -e; for script in $(BENCH); do echo "$$script"; $(BENCH_VENV)/bin/python $$script; done

clean:  ## remove what was built or written; keeps the environments
	rm -rf build dist docs/_build docs/generated docs/tutorials demo_output .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# A CUDA compiler of a few hundred megabytes, and nothing else.
$(NVCC_VENV)/.has-nvcc:
	$(PYTHON) -m venv $(NVCC_VENV)
	$(NVCC_VENV)/bin/python -m pip install --quiet --disable-pip-version-check nvidia-cuda-nvcc==13.0.88 \
		nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 "nvidia-cuda-runtime==13.0.*" "nvidia-cuda-cccl==13.0.*"
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(BENCH_VENV)/bin/python:
	$(PYTHON) -m venv $(BENCH_VENV)

# torch first and by itself, held to the tested version; nothing after it can then bring another. Each environment
# contains the one before it, so that `make demo` after `make test` has nothing to install.
$(VENV)/.has-run: $(WHAT) | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP_INSTALL) torch
	$(VENV)/bin/python $(PIP_INSTALL) -e ".[plots,data]"
	touch $@

$(VENV)/.has-test: $(WHAT) | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP_INSTALL) torch
	$(VENV)/bin/python $(PIP_INSTALL) -e ".[test]"
	touch $(VENV)/.has-run $@

$(VENV)/.has-dev: $(WHAT) | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP_INSTALL) torch
	$(VENV)/bin/python $(PIP_INSTALL) -e ".[dev]"
	touch $(VENV)/.has-run $(VENV)/.has-test $@

$(BENCH_VENV)/.has-bench: $(WHAT) benchmarks/requirements.txt | $(BENCH_VENV)/bin/python
	$(BENCH_VENV)/bin/python $(PIP_INSTALL) torch
	$(BENCH_VENV)/bin/python $(PIP_INSTALL) -e ".[plots,data]" -r benchmarks/requirements.txt
	touch $@
