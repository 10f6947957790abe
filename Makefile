# Two commands on a fresh machine: `make quickstart` and `make test`. Each sets up .venv first if that is missing.
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= runs/quickstart
# Where pip finds torch. Without a GPU, point it at PyTorch's CPU wheels to save several GB, for example
#   make install TORCH_PIP_ARGS="--extra-index-url <PyTorch's CPU index>"
TORCH_PIP_ARGS ?=

# pytest keeps test files with their assertions written out: 9 s of processor time for each test process. Not with this variable.
unexport PYTHONDONTWRITEBYTECODE

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install quickstart check test lint clean
help:
	@echo "make quickstart   the whole job on synthetic radiographs, on this machine (OUT=$(OUT))"
	@echo "make check        lint, types and the quick tests: under two minutes"
	@echo "make test         lint, types and all tests"
	@echo "make install      only set up $(VENV)"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "mmclip_dist needs Python 3.11 or newer; found $$($(PYTHON) -V). Try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt $(TORCH_PIP_ARGS) torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[nlp,s3,dev]'
	@touch $@

quickstart: $(STAMP)
	$(BIN)/mmclip quickstart --out $(OUT)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint
	$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test: lint
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
