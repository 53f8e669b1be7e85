# Every target sets up what it needs by itself: `make quickstart` or `make test` work from a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two processes on two cores: each test process keeps to one intra-op thread pool, see tests/conftest.py.
WORKERS ?= 2

.PHONY: install quickstart quickstart-detector quickstart-distiller test test-all lint format bench bench-gpu bench-detector bench-peers clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] < (3, 14), f"Python 3.11 to 3.13 is needed (TensorFlow has no wheels for newer ones), found {sys.version.split()[0]}: make PYTHON=python3.11 ..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

quickstart: quickstart-detector quickstart-distiller

quickstart-detector: install
	$(BIN)/python main.py --config=configs/mtl_moe/quickstart.py --workdir=runs/quickstart

DISTILL := $(BIN)/python main.py --config=configs/vit_distill/quickstart.py
STUDENTS := runs/quickstart_distill
quickstart-distiller: install
	$(DISTILL):teacher --workdir=$(STUDENTS)/teacher
	$(DISTILL):half --workdir=$(STUDENTS)/half
	$(DISTILL):third --workdir=$(STUDENTS)/third
	$(DISTILL):probe --workdir=$(STUDENTS)/probe
	$(DISTILL):probe_third --workdir=$(STUDENTS)/probe_third
	$(BIN)/python main.py --mode=export --export=timm --workdir=$(STUDENTS)/half

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

# Needs JAX with CUDA and PyTorch; ten minutes on one GPU. Not in .venv: PYTHON is the interpreter that has them.
bench-gpu:
	$(PYTHON) -m benchmarks.gpu

bench-detector: install
	$(BIN)/python -m benchmarks.detector

# make bench-peers ROOT=folder NAME=set MINUTES=80
bench-peers: install
	$(BIN)/python -m benchmarks.peer_quality --root=$(ROOT) --name=$(NAME) --minutes=$(MINUTES)

clean:
	rm -rf $(VENV) build dist *.egg-info
