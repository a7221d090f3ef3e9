# Needs Python 3.10 or newer. Everything is installed into .venv (tests inside other packages: .venv-NAME, too).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/uv pip install -q --python $(BIN)/python

.PHONY: demo test clients oldest quick check style bench tables

# Name what is on a photo; extract its feature pyramid, print the shapes, and draw photo and levels side by side.
demo: $(VENV)/demo
	$(BIN)/timm-crossformer classify examples/photo.jpg
	$(BIN)/timm-crossformer features examples/photo.jpg --whole --out outputs/pyramid.png
	@echo "Wrote outputs/pyramid.png: the photo beside its four levels."

# Lint, types and all tests but those of other people's packages.
test: $(VENV)/test check
	$(BIN)/python -m pytest -n 2 -m "not clients and not network"

# The tests inside segmentation-models-pytorch, torchvision, transformers, ... (tests/clients). Two of them need an
# environment of their own.
clients: $(VENV)/clients $(VENV)-terratorch/clients $(VENV)-mmpretrain/clients
	REQUIRE_CLIENTS=1 $(VENV)-terratorch/bin/python -m pytest tests/clients/test_terratorch.py
	REQUIRE_CLIENTS=1 $(VENV)-mmpretrain/bin/python -m pytest tests/clients/test_mmpretrain.py
	REQUIRE_CLIENTS=1 $(BIN)/python -m pytest -m clients tests/clients \
		--ignore tests/clients/test_terratorch.py --ignore tests/clients/test_mmpretrain.py

# timm's contract and stored outputs with the oldest timm that is supported.
oldest: $(VENV)/test
	$(INSTALL) --no-deps --target $(VENV)/oldest timm==1.0.30
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -m pytest -n 2 -m "not slow" \
		tests/test_timm_contract.py tests/test_golden.py tests/test_model.py

# The tests that take under a minute.
quick: $(VENV)/test
	$(BIN)/python -m pytest -n 2 -m "not slow and not clients and not network"

check: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/mypy

style: $(VENV)/test
	$(BIN)/ruff check --fix .

bench: $(VENV)/test
	$(INSTALL) -e ".[bench]"
	$(BIN)/python benchmarks/bench.py all --quick

tables: $(VENV)/test
	$(BIN)/python benchmarks/plot.py
	$(BIN)/python benchmarks/readme.py

$(VENV)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q uv
	touch $@

$(VENV)/demo: $(VENV)/uv pyproject.toml
	$(INSTALL) -e ".[viz]"
	touch $@

$(VENV)/test: $(VENV)/uv pyproject.toml
	$(INSTALL) -e ".[test]"
	touch $@

$(VENV)/clients: $(VENV)/test pyproject.toml
	$(INSTALL) -e ".[test,clients]"
	touch $@

$(VENV)-%/clients: $(VENV)/uv pyproject.toml tests/clients/requirements-%.txt
	$(BIN)/uv venv -q --clear --python $(BIN)/python $(VENV)-$*
	$(BIN)/uv pip install -q --python $(VENV)-$*/bin/python -e . pytest torchvision -r tests/clients/requirements-$*.txt
	touch $@
