# Everything runs from .venv, installed from full locks, so that it resolves the same next year.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CONFIG ?= jobs/configs/quickstart.yaml
QUESTION ?= How do I compute the shortest path between two nodes of a graph?
# The quickstart's default task is to find an object by a summary; questions are what its source "synthetic" is about.
TASK ?= $(if $(filter %quickstart.yaml,$(CONFIG)),synthetic)
COMPILED := $(wildcard platform/embedloom/*/_*.c platform/embedloom/*/_*.h)

.PHONY: demo test drill bench lint docs install install-dev clean

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# --no-deps: normal resolution adds CUDA builds of torchvision and torchaudio that break the CPU build of torch.
# The lock is complete, so nothing is missing; `embedloom doctor` says what a machine has.
$(VENV)/.installed: cluster/requirements-cpu.lock pyproject.toml $(COMPILED)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 11) else "the CPU lock is for Python 3.11, found " + sys.version.split()[0] + "; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps -r cluster/requirements-cpu.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed cluster/requirements-dev.lock
	$(PIP) --no-deps -r cluster/requirements-dev.lock
	touch $@

demo: install
	$(BIN)/embedloom run $(CONFIG)
	$(BIN)/embedloom serve $(CONFIG) --ask "$(QUESTION)" $(if $(TASK),--task $(TASK))

test: install-dev
	$(BIN)/python -m pytest

drill: install-dev
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
