# make demo, make docs, make test: each sets up a virtual environment by itself, the first time and when the versions change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core
READY := $(VENV)/.ready
OLDEST := .venv-oldest
# An older torch for the CPU alone is in PyTorch's own index only; where pip finds it, say OLDEST_TORCH=torch==2.6.0.
OLDEST_TORCH ?= --requirement requirements/torch.txt

.PHONY: demo docs test test-slow test-all test-oldest lint format lock licences audit release soak clean

# Without the developers' tools, unless they are there already.
demo: $(if $(wildcard $(READY)),$(READY),$(CORE))
	$(BIN)/python benchmarks/demo.py

# Its notebook is run, and a link that leads nowhere is an error.
docs: $(READY)
	$(BIN)/typer codebook_cli.app utils docs --name codebook --title "Command line" --output docs/cli.md
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs build/docs
	@echo "open build/docs/index.html"

# For whoever changes a line; CI runs the rest, too.
REST = slow or hostile or packaging
test: lint
	$(BIN)/python -m pytest -n auto -m "not ($(REST))"

test-slow: $(READY)
	$(BIN)/python -m pytest -n auto -m "$(REST)"

test-all: lint
	$(BIN)/python -m pytest -n auto

# The oldest versions that pyproject.toml allows: they have builds for Python 3.11.
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -n auto -m "not ($(REST))"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell *.md docs/*.md */README.md */*/README.md

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Pins stay where they can; UPGRADE=--upgrade takes the newest. That of torch is moved by hand, in requirements/torch.txt.
# Of Python 3.11 from 3.11.5 on, for some of the tools need that.
LOCK = $(BIN)/uv --config-file requirements/uv.toml pip compile pyproject.toml --quiet --universal --python-version 3.11.5 \
	--generate-hashes $(UPGRADE) --annotation-style line --custom-compile-command "make lock" \
	--no-emit-package torch --no-emit-package pip
lock: $(READY)
	$(LOCK) --extra all --constraint requirements/torch.txt --output-file requirements/runtime.txt
	$(LOCK) --extra report --constraint requirements/torch.txt --constraint requirements/runtime.txt --output-file requirements/core.txt
	$(LOCK) --extra dev --constraint requirements/torch.txt --constraint requirements/runtime.txt --output-file requirements/tested.txt
	$(LOCK) --extra dev --resolution lowest-direct --output-file requirements/oldest.txt

licences: $(READY)
	$(BIN)/python tools/licences.py requirements/licences.md

# Mixed commands, killed and not, for three minutes; MINUTES=60 for an hour.
MINUTES ?= 3
soak: $(READY)
	$(BIN)/python benchmarks/trust/soak.py --minutes $(MINUTES)

audit: $(READY)
	$(BIN)/python tools/audit.py requirements/tested.txt requirements/torch.txt

# Wheel, sdist and bill of materials of the last commit.
release: $(READY)
	$(BIN)/python tools/release.py dist

# (folder, pins, torch): the pins are all that is needed, each with the hashes of its files; torch.txt says why it has none.
PIP = $(BIN)/pip install --quiet --disable-pip-version-check
define environment
	@echo "Installing torch and `grep -c == $(2)` other packages into $(1); this takes some minutes."
	$(PYTHON) -m venv $(1)
	$(PIP) --require-hashes --no-deps --requirement $(2)
	$(PIP) $(3)
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@
endef

$(CORE): pyproject.toml requirements/core.txt requirements/torch.txt
	$(call environment,$(VENV),requirements/core.txt,--requirement requirements/torch.txt)

$(READY): pyproject.toml requirements/tested.txt requirements/torch.txt
	$(call environment,$(VENV),requirements/tested.txt,--requirement requirements/torch.txt)

$(OLDEST)/.ready: BIN := $(OLDEST)/bin
$(OLDEST)/.ready: pyproject.toml requirements/oldest.txt requirements/torch.txt
	$(call environment,$(OLDEST),requirements/oldest.txt,$(OLDEST_TORCH))

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info
