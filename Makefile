# Every target works from a fresh clone with python >= 3.11 and make, and nothing else installed: it makes .venv first.
PYTHON ?= python3
# More arguments for pip. Torch without CUDA, 200 MB instead of gigabytes:
#   make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
BUNDLE := .cache/bench.dash
BENCHES := dispatch bypass batch prefill load
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
# Tests run in two processes, on a processor each; PYTEST_ARGS="-n 0 ..." for one.
PYTEST := $(BIN)/python -m pytest -n 2 --no-loadscope-reorder
PYTEST_ARGS ?=
# The demo's model: smollm2-135m, or qwen2.5-coder-0.5b (400 MB).
MODEL ?= smollm2-135m
SECONDS ?= 3600

.PHONY: help demo serve test lint fuzz bench clean distclean
.DEFAULT_GOAL := help

help:
	@echo "make demo    a real model (SmolLM2-135M) to engines, answering prompts densely and with layers skipped"
	@echo "             (MODEL=qwen2.5-coder-0.5b: a larger one, 400 MB; MODEL=dinov2-small: an image encoder)"
	@echo "make serve   the demo's model behind OpenAI's API, and a page to try it: http://127.0.0.1:8000"
	@echo "make test    all tests (installs torch and transformers, which the reference needs)"
	@echo "make lint    ruff and mypy"
	@echo "make fuzz    damaged files for every parser, for an hour (SECONDS=60: a minute)"
	@echo "make bench   the benchmarks of tools/bench (ten minutes; nothing else should run)"
	@echo "make clean   remove .venv, build outputs and tool caches; .cache (the demo's model and bundle) stays"
	@echo "make distclean   the same, and .cache too"
	@echo "Each sets up .venv when it is missing. PYTHON=python3.12 chooses the interpreter (>= 3.11)."

demo: $(VENV)/.demo
	@$(BIN)/python tools/demo.py $(MODEL)

serve: $(VENV)/.serve
	@test -d .cache/smollm2.dash/engines || $(BIN)/python tools/demo.py
	@$(BIN)/dash-export serve .cache/smollm2.dash

test: $(VENV)/.test
	$(PYTEST) $(PYTEST_ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(VENV)/.test
	@nice -n 10 $(BIN)/python -m tests.fuzz --seconds $(SECONDS)

bench: $(VENV)/.demo
	@$(BIN)/dash-export build "$$($(BIN)/python tools/fetch.py)" --policy smollm2-135m-instruct --target cpu -o $(BUNDLE)
	@set -e; for name in $(BENCHES); do echo "== $$name"; $(BIN)/python tools/bench/$$name.py $(BUNDLE); done

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "dash-export's tools need Python 3.11 or newer, and '$(PYTHON)' is not. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Python's venv module is missing (Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; }

# A stamp per purpose, so that the demo does not wait for torch.
$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "Installing dash-export[cpu,export,eval,vision] into $(VENV)"
	@$(PIP) -e '.[cpu,export,eval,vision]'
	@touch $@

$(VENV)/.serve: pyproject.toml | $(VENV)/.demo
	@echo "Installing dash-export[serve] into $(VENV)"
	@$(PIP) -e '.[cpu,export,eval,serve]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo "Installing dash-export[test] into $(VENV) (torch and transformers: a few minutes)"
	@$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.lint: pyproject.toml | $(BIN)/python
	@echo "Installing dash-export[test,lint] into $(VENV) (mypy reads the types of what the tests use)"
	@$(PIP) -e '.[test,lint]'
	@touch $@ $(VENV)/.test
