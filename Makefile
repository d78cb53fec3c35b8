# Every command sets the environment up where that is still to be done: `make demo` is all a new machine needs.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all test-models check fuzz lint bench docs dist aot gpu gpu-kernels clean

# The first Python that is new enough and can make virtual environments; `make PYTHON=... ` overrides the search.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3.10 python3 python,$(shell \
	$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && echo $p)))
# `make test TORCH=2.6.0` runs the tests with another torch, in an environment of its own.
TORCH ?=
VENV := .venv$(addprefix -,$(TORCH))
BIN := $(VENV)/bin
CONSTRAINTS := $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint $(CONSTRAINTS)
INSTALLED := $(VENV)/installed

help:
	@echo "make demo         the import, the same losses, the time, a cell of your own, a frozen model: 3 minutes"
	@echo "make test         run all tests, the formatter, the linter and the type checker among them"
	@echo "make test TORCH=2.6.0   run all tests but those of style with another torch, in an environment of its own"
	@echo "make test-all     run the long tests too, about half an hour"
	@echo "make check        what continuous integration runs: make test"
	@echo "make test-models  install and run whole published models, with torch's layers and with ours"
	@echo "make fuzz         draw options and actions at random for SECONDS=600 from SEED=0 on, and print what fails"
	@echo "make lint         the formatter, the linter and the type checker alone"
	@echo "make docs         build the documentation as a site in build/site; warnings are errors"
	@echo "make dist         build dist/*.tar.gz and dist/*.whl and check what a package index will show"
	@echo "make bench        time rnnfast beside its peers"
	@echo "make aot          compile the GPU kernels for every target; needs no GPU"
	@echo "make gpu          check and measure on a machine with a GPU, in under 9 minutes; CALL=second: 3 minutes more"
	@echo "make gpu-kernels  compile for such a machine's Triton what make gpu wants; needs no GPU"
	@echo "make clean        remove caches and built files"

setup: $(INSTALLED)

# An environment whose setup was interrupted holds `incomplete` and is made anew. torch comes first and pinned, so that no other
# package chooses it.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "rnnfast needs Python >= 3.10 with its venv module (on Debian and Ubuntu:" \
		"apt install python3-venv)"; exit 1; }
	@if [ -e $(VENV)/incomplete ] || ! $(BIN)/python -c 'import pip' 2>/dev/null; then \
		echo "setup 1/3: creating $(VENV) with $(PYTHON)"; \
		rm -rf $(VENV) && mkdir $(VENV) && touch $(VENV)/incomplete && $(PYTHON) -m venv $(VENV); fi
	@touch $(VENV)/incomplete
	@$(if $(TORCH),grep -v -e '^torch==' -e '^triton' constraints.txt > $(CONSTRAINTS))
	@echo "setup 2/3: installing torch, the largest download"
	@$(PIP) torch$(addprefix ==,$(TORCH))
	@echo "setup 3/3: installing rnnfast and the tools of its tests and benchmarks"
	@$(PIP) --editable '.[dev,docs]'
	@touch $@ && rm $(VENV)/incomplete

demo: $(INSTALLED)
	$(BIN)/python -m examples.demo

# Processes that share the tests.
JOBS ?= 2
test check: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal $(if $(TORCH),--ignore=tests/project/test_style.py)

test-all: $(INSTALLED)
	$(BIN)/python -m pytest --all --numprocesses $(JOBS) --dist worksteal

test-models: $(INSTALLED)
	$(PIP) transformers sb3-contrib 'gluonts[torch]'
	$(BIN)/python -m pytest tests/models -s

SECONDS ?= 600
SEED ?= 0
fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --seed $(SEED)

lint: $(INSTALLED)
	$(BIN)/python -m pytest tests/project/test_style.py

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "the site is build/site/index.html"

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

dist: $(INSTALLED)
	$(PIP) --editable '.[release]'
	rm -rf dist && $(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

aot: $(INSTALLED)
	$(BIN)/python -m rnnfast_kernels.gpu.aot --quick

# A machine with a GPU brings its own torch and Triton: nothing is installed there.
CALL ?= first
gpu:
	PYTHONPATH=.:kernels python3 -m benchmarks.gpu $(CALL)

# By the release of Triton that the machine has, which is put beside the environment's own.
TRITON ?= 3.6.0
gpu-kernels: $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/gpu/triton triton==$(TRITON)
	PYTHONPATH=build/gpu/triton:.:kernels $(BIN)/python -m benchmarks.gpu fill

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
