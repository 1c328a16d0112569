# The two main commands: `make demo` installs everything and runs the whole pipeline, `make test` runs every check.
PYTHON ?= python3
VENV ?= .venv
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help install install-tests install-quantize demo test fast lint clean

help:
	@echo "make demo   install into $(VENV), then collect, train, evaluate and analyze on the embedded model"
	@echo "make test   install into $(VENV), then run lint, type checks and all tests"
	@echo "make fast   install into $(VENV), then run lint, type checks and the tests that start no engine"

install:
	@$(PYTHON) install.py $(VENV)

install-tests:
	@$(PYTHON) install.py $(VENV) --tests

demo: install
	@rm -rf specmoe-demo
	@$(VENV)/bin/specmoe demo --out specmoe-demo

# llmcompressor and vLLM require different versions of transformers, so they need separate environments.
install-quantize:
	@$(PYTHON) install.py $(VENV)-quantize --quantize

# The two installations run in parallel: one waits for the network while the other unpacks.
test:
	@$(MAKE) --no-print-directory -j 2 install-tests install-quantize
	@$(MAKE) --no-print-directory lint
	@$(VENV)/bin/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

fast: install-tests lint
	@$(VENV)/bin/python -m pytest -m "not slow"

lint: install-tests
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check --quiet .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports --no-logo

clean:
	rm -rf $(VENV) $(VENV)-quantize specmoe-demo
