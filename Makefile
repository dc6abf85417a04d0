# `make demo` and `make test` do their own set-up: a virtual environment in .venv, from constraints.txt.
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
EXTRAS := app,dev,docs
BIN := $(VENV)/bin
STAMP := $(VENV)/installed.stamp
TYPES := build/types/mole_diffusion
# Once installed, nothing asks a network.
export HF_HUB_OFFLINE := 1

.PHONY: help setup demo test test-lowest notebooks lint types links docs clean
help:
	@echo "make demo    three LoRAs in one picture: writes a picture sheet and says where"
	@echo "make test    the tests"
	@echo "make test-lowest  the same with the oldest versions that are allowed, in an environment of their own"
	@echo "make notebooks  run the notebooks, as the tests do"
	@echo "make lint    ruff: rules and format; import-linter: which room may import which"
	@echo "make types   mypy"
	@echo "make docs    the pages in docs/ as a site, in build/site"
	@echo "make clean   remove .venv and what was built"

setup: $(STAMP)

demo: $(STAMP)
	$(BIN)/mole demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations=10

test-lowest:
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt EXTRAS=app,dev

notebooks: $(STAMP)
	$(BIN)/python -m pytest -q tests/test_notebooks.py

lint: $(STAMP) links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/types && PYTHONPATH=. $(CURDIR)/$(BIN)/lint-imports $(CURDIR)/pyproject.toml --no-cache --no-logo

# The package as it is installed: pipelines/ and metrics/ are folders of their own here and sub-packages there.
links:
	@rm -rf $(TYPES) && mkdir -p $(TYPES)
	@ln -s $(CURDIR)/mole_diffusion/* $(CURDIR)/pipelines $(CURDIR)/metrics $(TYPES)/

types: $(STAMP) links
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p mole_diffusion

docs: $(STAMP) links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time this takes some minutes (PyTorch is large), and some 7 GB of disk."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf .venv .venv-lowest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
