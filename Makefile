# Every target sets itself up: a virtual environment in .venv, installed from pyproject.toml.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_FLAGS ?=
# A process for each core, up to eight; one that has nothing left takes tests from another. WORKERS=0: all in one.
WORKERS ?= auto
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help demo test test-slow test-arviz1 lint format doctest examples map docs docs-serve wheel try-wheel clean

help:
	@echo "make demo       set up, then learn a LoRA prior from digit tasks and adapt to unseen ones (about 3 minutes)"
	@echo "make test       set up, then run the tests"
	@echo "make test-slow  the statistical and heavy tests"
	@echo "make test-arviz1  the tests of what ArviZ gets, with ArviZ 1.x in an environment of its own (Python 3.12 or newer)"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff rewrite the code"
	@echo "make doctest    the examples in the docstrings"
	@echo "make examples   every example in its short form"
	@echo "make map        draw docs/figures/architecture.svg from the import graph"
	@echo "make docs       build the site into build/docs, every tutorial executed, warnings as errors"
	@echo "make docs-serve the same, then show it at http://localhost:8000"
	@echo "make wheel      build the wheel"
	@echo "make try-wheel  build it, and run the short demo and README's programs with it in a clean environment"

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/pyro-lift demo

test: $(VENV)/.installed
	$(PYTEST) $(PYTEST_FLAGS)

test-slow: $(VENV)/.installed
	$(PYTEST) -m slow $(PYTEST_FLAGS)

# ArviZ 1.x needs Python 3.12; the first of these that there is makes an environment of its own.
ARVIZ1_VENV ?= .venv-arviz1
ARVIZ1_PYTHON ?= $(shell for p in $(PYTHON) python3.14 python3.13 python3.12 $$HOME/.pyenv/versions/3.1[2-9]*/bin/python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { echo $$p; break; }; done)
ARVIZ_TESTS := tests/test_arviz_groups.py tests/test_diagnostics.py tests/test_arviz_loo.py tests/house/test_workflow.py

$(ARVIZ1_VENV)/.installed: pyproject.toml
	@test -n "$(ARVIZ1_PYTHON)" || { echo "ArviZ 1.x needs Python 3.12 or newer: make test-arviz1 ARVIZ1_PYTHON=..."; exit 1; }
	$(ARVIZ1_PYTHON) -m venv $(ARVIZ1_VENV)
	$(ARVIZ1_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(ARVIZ1_VENV)/bin/python -m pip install --quiet --editable ".[test]" "arviz>=1"
	touch $@

test-arviz1: $(ARVIZ1_VENV)/.installed
	$(ARVIZ1_VENV)/bin/python -c 'import arviz; print("ArviZ", arviz.__version__); assert int(arviz.__version__.split(".")[0]) >= 1'
	$(ARVIZ1_VENV)/bin/python -m pytest $(ARVIZ_TESTS) -m "" $(PYTEST_FLAGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

doctest: $(VENV)/.installed
	$(BIN)/python -m pytest --doctest-modules pyro_lift

examples: $(VENV)/.installed
	$(PYTEST) tests/house/test_examples.py

map: $(VENV)/.installed
	$(BIN)/python docs/make_map.py

$(VENV)/.docs-installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

# PYRO_LIFT_DOCS=fast leaves the tutorials unexecuted, for work on the words.
docs: $(VENV)/.docs-installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -j auto -b html -d build/doctrees docs build/docs
	@echo "written: build/docs/index.html"

docs-serve: docs
	$(BIN)/python -m http.server 8000 --directory build/docs

wheel: $(VENV)/.installed
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

try-wheel: wheel
	rm -rf build/clean && $(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --quiet dist/pyro_lift-*.whl
	cd build/clean && bin/pyro-lift --version && bin/pyro-lift demo --smoke --out demo
	cd build/clean && bin/python $(CURDIR)/docs/try_readme.py $(CURDIR)/README.md

clean:
	rm -rf $(VENV) build dist *.egg-info
