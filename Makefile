# The two main commands: `make demo` installs everything and runs the whole pipeline, `make test` runs every check.
PYTHON ?= python3
VENV ?= .venv
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help install install-tests install-quantize demo test test-all run-tests fast docs lint clean

help:
	@echo "make demo   install into $(VENV), then collect, train, evaluate and analyze on the embedded model"
	@echo "make test   install into $(VENV), then run lint, type checks and all tests"
	@echo "make test-all  as test, with 10,000 mutated inputs per reader instead of 1,000, all families of models, and the installed wheel (some 20 minutes more)"
	@echo "make docs   build the documentation, with the reference of the Python API, into site/"
	@echo "make fast   install into $(VENV), then run lint, type checks and the tests that start neither engines nor containers"

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

# The two installations run in parallel: one waits for the network while the other unpacks. So do the checks of the source and the
# tests: mypy keeps one core busy for a minute.
test:
	@$(MAKE) --no-print-directory -j 2 install-tests install-quantize
	@$(MAKE) --no-print-directory -j 2 lint run-tests

run-tests:
	@$(VENV)/bin/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

# As `test`, with ten times as many mutated inputs, with every family that `python -m vllm_patch check` knows, and with the demo in
# an environment that has only the wheel and what it requires.
test-all:
	@SPECMOE_FUZZ_INPUTS=10000 SPECMOE_ALL_FAMILIES=1 SPECMOE_RELEASE=1 $(MAKE) --no-print-directory test

fast: install-tests lint
	@$(VENV)/bin/python -m pytest -m "not (engine or modal or awq or fuzz)"

docs: install-tests
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

lint: install-tests
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check --quiet .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports --no-logo

clean:
	rm -rf site $(VENV) $(VENV)-quantize specmoe-demo
