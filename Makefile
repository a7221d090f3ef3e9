# Needs Python 3.11 or newer. Everything is installed into .venv (what needs other versions: into .venv-NAME).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV = $(BIN)/uv
INSTALL = $(UV) pip install -q --python $(BIN)/python

# python3.11, or the Python at hand where it has another name; python3.13, or that again: on the path, or from pyenv.
find = $(firstword $(shell for python in python$(1) "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$(1)*/bin/python; do \
	"$$python" -c '' 2>/dev/null && echo "$$python"; done))
PYTHON311 = $(or $(call find,3.11),$(PYTHON))
PYTHON313 = $(or $(call find,3.13),$(PYTHON))

# One pool of workers that stays busy: each starts with long tests and takes from the others when it is through, see
# tests/running_order.py.
WORKERS ?= 2
PYTEST = -m pytest -n $(WORKERS) --dist worksteal --durations 10 --durations-min 2
QUICK := not slow and not clients and not network
# What the versions of PyTorch, timm and the others decide: files whose quick tests run on every set of versions.
CORE := $(addprefix tests/,$(addsuffix .py,$(addprefix model/test_,model inference golden timm_contract numbers precision) \
	ops/test_ops ops/test_grouping checkpoints/test_reading checkpoints/test_hub checkpoints/test_weights \
	project/test_imports))

.NOTPARALLEL:
.PHONY: demo test test-all slow oldest conformance package clients quick check style bench gpu tables

# Name what is on a photo; extract its feature pyramid, print the shapes, and draw photo and levels side by side.
demo: $(VENV)/demo
	$(BIN)/timm-crossformer classify examples/photo.jpg
	$(BIN)/timm-crossformer features examples/photo.jpg --whole --out outputs/pyramid.png
	@echo "Wrote outputs/pyramid.png: the photo beside its four levels."

# Lint, types and the quick tests, on the newest versions.
test: check quick

# All there is: the long tests, other versions, timm's own tests, the wheel, other people's packages.
test-all: test slow oldest conformance package clients

quick: $(VENV)/test
	$(BIN)/python $(PYTEST) -m "$(QUICK)"

slow: $(VENV)/test
	$(BIN)/python $(PYTEST) -m "slow and not clients and not network"

# The quick tests of the core with the oldest versions of everything that is needed.
oldest: $(VENV)-oldest/test
	$(VENV)-oldest/bin/python $(PYTEST) -m "$(QUICK)" $(CORE)

# timm's own tests, of the version that is installed, on one model per kind of network; with VARIANTS=all on all.
conformance: $(VENV)/conformance
	$(BIN)/python tests/conformance/fetch.py
	$(BIN)/python $(PYTEST) tests/conformance

# Build wheel and source distribution, use them away from here, and run the quick tests of the core of the one on the
# other, with Python 3.13 where there is one.
package: $(VENV)/package
	PACKAGE_PYTHON=$(PYTHON313) WORKERS=$(WORKERS) CORE="$(CORE)" $(BIN)/python -m pytest tests/package

# The tests inside segmentation-models-pytorch, torchvision, transformers, ... Two of them need an environment of their
# own.
clients: $(VENV)/clients $(VENV)-terratorch/clients $(VENV)-mmpretrain/clients
	REQUIRE_CLIENTS=1 $(VENV)-terratorch/bin/python -m pytest tests/clients/test_terratorch.py
	REQUIRE_CLIENTS=1 $(VENV)-mmpretrain/bin/python -m pytest tests/clients/test_mmpretrain.py
	REQUIRE_CLIENTS=1 $(BIN)/python -m pytest -m clients tests \
		--ignore tests/clients/test_terratorch.py --ignore tests/clients/test_mmpretrain.py

check: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/mypy

style: $(VENV)/test
	$(BIN)/ruff check --fix .

bench: $(VENV)/test
	$(INSTALL) -e ".[bench]"
	$(BIN)/python benchmarks/speed/bench.py all --quick

# A verdict on the card at hand, with the Python at hand and what is installed there: no network is needed.
gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/speed/gpu.py $(GPU)

tables: $(VENV)/test
	$(BIN)/python benchmarks/docs/plot.py
	$(BIN)/python benchmarks/docs/readme.py

$(VENV)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q uv
	touch $@

$(VENV)/demo: $(VENV)/uv pyproject.toml
	$(INSTALL) -e ".[viz]"
	touch $@

$(VENV)/test: $(VENV)/uv pyproject.toml
	$(BIN)/python benchmarks/docs/versions.py newest > $(VENV)/constraints.txt
	$(INSTALL) -e ".[test]" -c $(VENV)/constraints.txt
	touch $@

$(VENV)/conformance: $(VENV)/test
	$(INSTALL) expecttest pdm-backend
	touch $@

$(VENV)/package: $(VENV)/test
	$(INSTALL) twine
	touch $@

$(VENV)/clients: $(VENV)/test pyproject.toml
	$(INSTALL) -e ".[test,clients]" -c $(VENV)/constraints.txt
	touch $@

$(VENV)-oldest/test: $(VENV)/uv pyproject.toml
	$(UV) venv -q --clear --python $(PYTHON311) $(VENV)-oldest
	$(BIN)/python benchmarks/docs/versions.py oldest > $(VENV)-oldest/constraints.txt
	$(UV) pip install -q --python $(VENV)-oldest/bin/python -e ".[test]" -c $(VENV)-oldest/constraints.txt
	touch $@

$(VENV)-%/clients: $(VENV)/uv pyproject.toml tests/clients/requirements-%.txt
	$(UV) venv -q --clear --python $(BIN)/python $(VENV)-$*
	$(UV) pip install -q --python $(VENV)-$*/bin/python -e . pytest torchvision -r tests/clients/requirements-$*.txt
	touch $@
