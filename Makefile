# Each target does its own set-up on a machine that has only Python (3.11 or later) and make.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow lint docs conformance clean

demo: $(INSTALLED)  ## train on the Python standard library, measure on held-out files, generate: a few minutes
	$(RUN)/python examples/demo.py

test: lint  ## everything that is quick, without network
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2

test-slow: $(INSTALLED)  ## what takes longer
	$(RUN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/python -m mypy

conformance: $(INSTALLED)  ## Transformers' own model tests; fetches the source of the installed version with pip
	OMP_NUM_THREADS=1 $(RUN)/python conformance/run.py $(if $(SOURCE),--source $(SOURCE))

docs: $(INSTALLED)  ## the documentation site, in site/
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(RUN)/mkdocs build --quiet

clean:
	rm -rf $(VENV) site

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "megalodon needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)
