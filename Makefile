# Needs Python 3.10 or newer. Everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test clients quick check style bench tables

# Extract the feature pyramid of a photo, print the shape of each level, and draw photo and levels side by side.
demo: $(VENV)/demo
	$(BIN)/timm-crossformer features examples/photo.jpg --whole --out outputs/pyramid.png
	@echo "Wrote outputs/pyramid.png: the photo beside its four levels (weights: test_crossformer.cifar10)."

# Lint, types and all tests but those of other people's packages.
test: $(VENV)/test check
	$(BIN)/python -m pytest -n 2 -m "not clients and not network"

# The tests inside segmentation-models-pytorch, torchvision, transformers, ... (tests/clients).
clients: $(VENV)/clients
	$(BIN)/python -m pytest -m clients

# The tests that take under a minute.
quick: $(VENV)/test
	$(BIN)/python -m pytest -n 2 -m "not slow and not clients and not network"

check: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/mypy

style: $(VENV)/test
	$(BIN)/ruff check --fix .

bench: $(VENV)/test
	$(BIN)/python -m pip install -q -e ".[bench]"
	$(BIN)/python benchmarks/bench.py all --quick

tables: $(VENV)/test
	$(BIN)/python benchmarks/plot.py
	$(BIN)/python benchmarks/readme.py

$(VENV)/pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	touch $@

$(VENV)/demo: $(VENV)/pip pyproject.toml
	$(BIN)/python -m pip install -q -e ".[viz]"
	touch $@

$(VENV)/test: $(VENV)/pip pyproject.toml
	$(BIN)/python -m pip install -q -e ".[test]"
	touch $@

$(VENV)/clients: $(VENV)/test pyproject.toml
	$(BIN)/python -m pip install -q -e ".[test,clients]"
	touch $@
