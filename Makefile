# Two commands do everything: `make demo` and `make test`. Both set up .venv first (see scripts/make_env.sh).
SHELL := /bin/bash
.DEFAULT_GOAL := help
PY := .venv/bin/python
CXX_SOURCES := $(wildcard csrc/*.cpp csrc/*.h tests/csrc/*.cpp tests/soak/*.cpp tests/soak/*.h bench/*.cpp)

.PHONY: help env libtpu demo test lint soak goldens parity clean

help:
	@echo "make demo   set up, then run the whole method on a small corpus of real encoded videos (report in demo/)"
	@echo "make test   set up, then lint, type check, C++ and Python tests"
	@echo "make env    only set up: .venv with Python 3.12 and the C++ decoder"
	@echo "make soak   set up, then fuzz the decoder under sanitizers for SOAK_SECONDS (60), look for races and leaks, and"
	@echo "            kill a process while it writes checkpoints, 20 times, and captioning jobs SOAK_KILLS (100) times"
	@echo "            with each engine, and test kernels, models and training with the oldest JAX"
	@echo "make libtpu set up, then fetch the TPU compiler (make test does too); bench.tpu_aot needs it, a TPU it does not"
	@echo "make lint   ruff, mypy, clang-format"
	@echo "make parity set up, then compare with PyTorch's transformers at random seeds and real layer shapes; PYTHON= a"
	@echo "            Python that PyTorch has a build for (python3.12), SEED= of the weights"

env: .venv/.made

.venv/.made: scripts/make_env.sh setup.py pyproject.toml constraints.txt CMakeLists.txt $(CXX_SOURCES)
	./scripts/make_env.sh

# Large temporaries stay mapped between steps: page faults cost 10 to 20% of a training step otherwise.
MALLOC := glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=8589934592

demo: env
	GLIBC_TUNABLES=$(MALLOC) $(PY) -m pyvdl demo

lint: env
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PY) -m mypy
	.venv/bin/clang-format --dry-run --Werror $(CXX_SOURCES)

# The compiler for TPUs, which tests and benches run on machines that have none. It stands apart from .venv because JAX
# would look for a TPU at every start if it found it there.
build/libtpu/.made: constraints.txt | env
	.venv/bin/uv pip install --quiet --python $(PY) --constraint constraints.txt --no-deps --target build/libtpu libtpu
	touch $@

libtpu: build/libtpu/.made

# A process holds up to 2 GiB; those of a file share what its fixtures set up.
test: lint libtpu
	$(PY) -m pytest tests --numprocesses=auto --maxprocesses=4 --dist=loadfile

# The reference implementation has an environment of its own. PyTorch's build for CPUs does, where pip can be led to it.
PYTHON ?= python3.12
SEED ?= $(shell date +%s)
PARITY := build/parity/env/bin/python
REFERENCE := PYTHONPATH=tests $(PARITY) -P -m parity

build/parity/env/.made: tests/parity/requirements.txt
	rm -rf build/parity/env
	$(PYTHON) -m venv build/parity/env
	$(PARITY) -m pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

# Makes the committed goldens anew; the same versions make the same ones.
goldens: build/parity/env/.made
	$(REFERENCE).make_goldens tests/parity/golden

parity: env build/parity/env/.made
	rm -rf build/parity/again build/parity/live build/parity/exports
	$(REFERENCE).make_goldens build/parity/again --against tests/parity/golden
	$(REFERENCE).make_goldens build/parity/live --seed $(SEED) --real
	$(PY) -m tests.parity.compare_live build/parity/live --exports build/parity/exports
	$(REFERENCE).check_exports build/parity/exports build/parity/live

# The oldest JAX that is supported.
OLDEST := 0.11.2

soak: env
	$(PY) -m tests.soak
	PYVDL_KILLS=20 $(PY) -m pytest tests/test_checkpoint.py -k half_written
	$(PY) -m tests.soak.captions
	.venv/bin/uv pip install --quiet --python $(PY) --no-deps --target build/soak/oldest jax==$(OLDEST) jaxlib==$(OLDEST)
	PYTHONPATH=build/soak/oldest $(PY) -m pytest tests/test_kernels.py tests/test_models.py tests/test_train.py

clean:
	rm -rf build .venv demo
