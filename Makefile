# Needs Python 3.11 or newer. Everything is installed into .venv (what needs other versions: into .venv-NAME).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV = $(BIN)/uv
INSTALL = $(UV) pip install -q --python $(BIN)/python

# python3.11, or the Python at hand where it has another name; python3.13, or nothing: on the path, or from pyenv.
find = $(firstword $(shell for python in python$(1) "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$(1)*/bin/python; do \
	"$$python" -c '' 2>/dev/null && echo "$$python"; done))
PYTHON311 = $(or $(call find,3.11),$(PYTHON))
PYTHON313 := $(call find,3.13)

# One pool of workers that stays busy: each starts with long tests and takes from the others when it is through, see
# tests/running_order.py.
WORKERS ?= 2
PYTEST = -m pytest -n $(WORKERS) --dist worksteal --durations 10 --durations-min 2
QUICK := not slow and not clients and not network

.NOTPARALLEL:
.PHONY: demo test test-all slow oldest py313 conformance package clients quick check style bench tables

# Name what is on a photo; extract its feature pyramid, print the shapes, and draw photo and levels side by side.
demo: $(VENV)/demo
	$(BIN)/timm-crossformer classify examples/photo.jpg
	$(BIN)/timm-crossformer features examples/photo.jpg --whole --out outputs/pyramid.png
	@echo "Wrote outputs/pyramid.png: the photo beside its four levels."

# Lint, types and the tests of every promise, on the newest versions.
test: check quick

# All there is: the long tests, other versions, timm's own tests, the wheel, other people's packages.
test-all: test slow oldest py313 conformance package clients

quick: $(VENV)/test
	$(BIN)/python $(PYTEST) -m "$(QUICK)"

slow: $(VENV)/test
	$(BIN)/python $(PYTEST) -m "slow and not clients and not network"

# The quick tests with the oldest versions of everything that is needed.
oldest: $(VENV)-oldest/test
	$(VENV)-oldest/bin/python $(PYTEST) -m "$(QUICK)"

# The quick tests with Python 3.13, where there is one.
ifneq ($(PYTHON313),)
py313: $(VENV)-py313/test
	$(VENV)-py313/bin/python $(PYTEST) -m "$(QUICK)"
else
py313:
	@echo "Left out: the tests with Python 3.13. There is no python3.13 on the path."
endif

# timm's own tests, of the version that is installed, on one model per kind of network; with VARIANTS=all on all.
conformance: $(VENV)/conformance
	$(BIN)/python tests/conformance/fetch.py
	$(BIN)/python $(PYTEST) tests/conformance

# Build wheel and source distribution, use them away from here.
package: $(VENV)/package
	$(BIN)/python -m pytest tests/package

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
	$(BIN)/python benchmarks/versions.py newest > $(VENV)/constraints.txt
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
	$(BIN)/python benchmarks/versions.py oldest > $(VENV)-oldest/constraints.txt
	$(UV) pip install -q --python $(VENV)-oldest/bin/python -e ".[test]" -c $(VENV)-oldest/constraints.txt
	touch $@

$(VENV)-py313/test: $(VENV)/uv pyproject.toml
	$(UV) venv -q --clear --python $(PYTHON313) $(VENV)-py313
	$(BIN)/python benchmarks/versions.py newest > $(VENV)-py313/constraints.txt
	$(UV) pip install -q --python $(VENV)-py313/bin/python -e ".[test]" -c $(VENV)-py313/constraints.txt
	touch $@

$(VENV)-%/clients: $(VENV)/uv pyproject.toml tests/clients/requirements-%.txt
	$(UV) venv -q --clear --python $(BIN)/python $(VENV)-$*
	$(UV) pip install -q --python $(VENV)-$*/bin/python -e . pytest torchvision -r tests/clients/requirements-$*.txt
	touch $@
