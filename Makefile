# HybriMoE. `make help` lists the targets.
PYTHON ?= python3
# Accelerator that llama.cpp is built for: auto, cuda, vulkan or none.
GPU    ?= auto
VENV   := .venv
PY     := $(VENV)/bin/python
NATIVE := $(shell find native -type f 2>/dev/null) CMakeLists.txt pyproject.toml
# Sanitizers of `make test-native`: address (with undefined), thread, or empty.
SAN    ?=
# Two processes share the test files: most tests keep one processor busy, and more of them would crowd the models' threads.
PYTEST := $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help chat setup dev test test-all test-hosts test-native fuzz lint format docs field reproduce clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

chat: setup  ## chat with the demo model (sets everything up the first time: some minutes)
	@$(VENV)/bin/hybrimoe chat

setup: $(VENV)/.hybrimoe  ## the environment in .venv: llama-cpp-python, the plug-in, the package

dev: $(VENV)/.dev  ## the same, with what tests and linters need

test: dev  ## the test suite
	@$(PYTEST) -m "not slow"

test-all: dev  ## the whole suite, slow tests too
	@$(PYTEST)

test-hosts: dev  ## the plug-in in llama.cpp's own programs: the pin's (built once: many minutes) and a distribution's
	@$(PY) -m pytest -m hosts tests/hosts

test-native: dev  ## the native tests alone; SAN=address or SAN=thread builds them with sanitizers
	@$(PY) tools/test_native.py --sanitize "$(SAN)"

fuzz: dev  ## coverage-guided fuzzing of all readers, SECONDS=60 each (atheris; the native ones need clang)
	@$(PY) tools/fuzz.py --seconds $(or $(SECONDS),60)

lint: dev  ## ruff, mypy, clang-format
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@git ls-files 'native/*.cpp' 'native/*.h' 'native/*.c' | xargs $(VENV)/bin/clang-format --dry-run --Werror

format: dev  ## rewrite sources as the linters want them
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .
	@git ls-files 'native/*.cpp' 'native/*.h' 'native/*.c' | xargs $(VENV)/bin/clang-format -i

docs: dev  ## docs/cli.md, made from the command line itself
	@$(PY) tools/make_cli_docs.py

field: dev  ## `hybrimoe plan` against speeds that others measured; LIST=FILE takes another list, JSON=FILE keeps the points
	@$(PY) tools/price_field.py $(if $(JSON),--json "$(JSON)") $(if $(LIST),"$(LIST)")

reproduce: dev  ## docs/reproduction.md: published figures beside ours (needs HYBRIMOE_TRACES; some minutes)
	@$(PY) tools/make_reproduction.py

clean:  ## remove .venv and build products (models and downloads in your cache stay)
	rm -rf $(VENV) build dist

# Set-up steps read nothing from stdin: `make chat < questions.txt` keeps it for the chat.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' </dev/null \
	    || { printf 'error: Python 3.10 or newer is needed\nhint: make PYTHON=python3.12 chat\n' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) </dev/null \
	    || { printf 'error: no virtual environment could be made\nhint: apt install python3-venv\n' >&2; rm -rf $(VENV); exit 1; }
	@$(PY) -m pip install --quiet --disable-pip-version-check --upgrade pip </dev/null
	@touch $@

# One stamp for each value of GPU, of which only the installed one exists: another GPU=... installs anew.
$(VENV)/.llama-$(GPU): $(VENV)/.python native/cmake/llama_cpp_release.txt native/cmake/llama_cpp_trim.cmake
	@$(PY) tools/install_llama_cpp.py --gpu $(GPU) </dev/null
	@rm -f $(VENV)/.llama-*
	@touch $@

$(VENV)/.hybrimoe: $(VENV)/.llama-$(GPU) $(NATIVE)
	@echo "installing hybrimoe (compiles the plug-in)" >&2
	@$(PY) -m pip install --quiet --disable-pip-version-check -e . </dev/null
	@touch $@

$(VENV)/.dev: $(VENV)/.hybrimoe
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]' </dev/null
	@touch $@
