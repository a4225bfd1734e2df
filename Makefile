# Everything starts from Python 3.11+ and make. `make setup` builds .venv; the other targets need nothing more.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet

.PHONY: setup demo test check check-slow clean

setup: $(VENV)/ready

# torch comes first and by exact version: a bare "torch" would bring gigabytes of CUDA where a CPU wheel will do.
$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Owl needs Python 3.11 or newer; set PYTHON=…"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up .venv (some minutes, once)"
	@$(PIP) install --no-warn-script-location "torch==$$(sed -n 's/^torch==//p' constraints.txt)" 2>&1 | grep -v '^WARNING: Location' || true
	@$(PIP) install --constraint constraints.txt --editable '.[dev]' 2>&1 | grep -v '^WARNING: Location' || true
	@$(BIN)/owl --help > /dev/null
	@touch $@

demo: setup
	@$(BIN)/owl demo

test: setup
	@$(BIN)/pytest -q

check: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

check-slow: setup
	@$(BIN)/pytest -q -m slow

clean:
	rm -rf $(VENV) owl-demo *.egg-info
