# `make demo` and `make test` do all the set-up they need: Python >= 3.10 and make are enough.
#   make demo DEMO_ARGS="--help"     options of the demo
#   make test PYTEST_ARGS="-k mask"  a part of the tests
#   make quick                       lint, and the quick part of the tests: 3 minutes of CPU time
#   make test WORKERS=0              the tests in one process, such as for a debugger; as many as cores by default
#   make venv PYTHON=python3.12      choose the interpreter

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= auto

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/installed

# What to run before each commit: the parts of the core, the report and the rules of the house; no training, and no
# comparison with another library's large models.
QUICK := tests/test_architecture.py tests/core tests/data tests/measures tests/transfer/test_report.py \
  tests/transfer/test_chain.py $(addprefix --ignore=tests/, core/test_conversion.py core/test_weights_commands.py \
  core/test_transformers_parity.py core/test_encoder_facts.py core/test_checkpoint_files.py data/test_digits.py)

# A file is one worker's, in the order of tests/conftest.py: the long ones first.
PYTEST := $(PY) -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help venv demo test quick lint docs wheel clean

help:
	@echo "make demo    pre-train, classify, detect, segment; writes runs/demo/report.html"
	@echo "make test    lint, then all tests"
	@echo "make quick   lint, then the quick part of the tests, 3 minutes of CPU time"
	@echo "make lint    ruff and mypy"
	@echo "make docs    the site of the pages and the API in build/docs"
	@echo "make wheel   build the wheel, install it into a new environment, use it in an empty folder"
	@echo "make venv    only the virtual environment in $(VENV)"
	@echo "make clean   remove $(VENV) and caches; runs/ stays"

venv: $(STAMP)

# The stamp is written last: an install that was cut short is taken up again.
$(STAMP): setup.py constraints.txt
	@set -eu; \
	if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  python=""; old=""; bare=""; \
	  for candidate in $(or $(PYTHON),python3.12 python3.11 python3.10 python3 python); do \
	    command -v "$$candidate" >/dev/null 2>&1 || continue; \
	    if ! "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then \
	      old="$$old $$candidate"; continue; fi; \
	    if ! "$$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then \
	      bare="$$bare $$candidate"; continue; fi; \
	    python="$$candidate"; break; \
	  done; \
	  if [ -z "$$python" ]; then \
	    if [ -n "$$bare" ]; then \
	      echo "error: Python >= 3.10 is here ($${bare# }) but without its venv module;" \
	        "install it (on Debian and Ubuntu the package python3-venv) and run make again" >&2; \
	    elif [ -n "$$old" ]; then \
	      echo "error: Python >= 3.10 is needed, and what was found is older or broken ($${old# });" \
	        "install a newer Python, or name one with make PYTHON=/path/to/python" >&2; \
	    else \
	      echo "error: Python >= 3.10 is needed, and none was found on PATH;" \
	        "install one, or name it with make PYTHON=/path/to/python" >&2; \
	    fi; \
	    exit 2; \
	  fi; \
	  echo "making $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv --clear $(VENV); \
	fi; \
	echo "installing the tested set into $(VENV) (some minutes and about 6 GB the first time)"; \
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all]'; \
	touch $@

demo: $(STAMP)
	$(PY) examples/demo/run.py $(DEMO_ARGS)

test: lint
	$(PYTEST) $(PYTEST_ARGS)

quick: lint
	$(PYTEST) $(QUICK) $(PYTEST_ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: $(STAMP)
	$(PY) -m sphinx -W --keep-going -b html docs build/docs
	@echo "open build/docs/index.html"

# What a user of the wheel has: no clone, nothing but what the package asks for, and recipes by name. The environment of
# about 6 GB goes again when all went well.
wheel:
	rm -rf build/lib build/bdist.* build/wheel build/wheel-env
	$(or $(PYTHON),python3) -m venv build/wheel-env
	build/wheel-env/bin/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	build/wheel-env/bin/python -m pip install --quiet -c constraints.txt "$$(ls build/wheel/*.whl)[demo,onnx]"
	sh tests/wheel.sh build/wheel-env/bin
	rm -rf build/wheel-env

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find mae_core transfer tests -name __pycache__ -type d -prune -exec rm -rf {} +
