# make demo, make docs, make test: each sets up a virtual environment by itself, the first time and when the versions change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo docs test test-slow test-all lint format clean

demo: $(READY)
	$(BIN)/python benchmarks/demo.py

# Its notebook is run, and a link that leads nowhere is an error.
docs: $(READY)
	$(BIN)/typer codebook_cli.app utils docs --name codebook --title "Command line" --output docs/cli.md
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs build/docs
	@echo "open build/docs/index.html"

test: lint
	$(BIN)/python -m pytest -n auto -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -n auto -m slow

test-all: lint
	$(BIN)/python -m pytest -n auto

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml requirements/tested.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements/tested.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
