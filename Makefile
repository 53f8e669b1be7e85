# Every target sets up what it needs by itself: `make quickstart` or `make test` work from a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two processes on two cores: each test process keeps to one intra-op thread pool, see tests/conftest.py.
WORKERS ?= 2

.PHONY: install quickstart test test-all lint format bench clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, found {sys.version.split()[0]}: make PYTHON=python3.11 ..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

quickstart: install
	$(BIN)/python main.py --config=configs/mtl_moe/quickstart.py --workdir=runs/quickstart

test: install
	$(BIN)/python -m pytest -n $(WORKERS)

test-all: install
	$(BIN)/python -m pytest -n $(WORKERS) -m ''

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m benchmarks.metrics
	$(BIN)/python -m benchmarks.moe

clean:
	rm -rf $(VENV) build dist *.egg-info
