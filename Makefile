VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DEMO := demo
JOBS ?= 2
# A file's tests stay in one process, with what they share. tests/conftest.py says which files begin.
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: help install test unit lint demo clean

help:
	@echo "make demo   quantize a real model (SmolLM2-135M), measure and export it, in $(DEMO)/"
	@echo "make test   all tests, those on the real model too"
	@echo "make unit   the tests that need no model (minutes)"
	@echo "make lint   formatting, lint, types, import contracts"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

test: install
	$(PYTEST)

unit: install
	$(PYTEST) -m "not model"

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The main job on a real model: W4A16 with GPTQ, exported for vLLM, verified, measured on text it was not calibrated on.
demo: install
	@test -f $(DEMO)/model/config.json || $(BIN)/fewbit demo-model $(DEMO)/model
	@rm -rf $(DEMO)/run
	$(BIN)/fewbit quantize $(DEMO)/model --output $(DEMO)/run --scheme W4A16 --group-size 64 \
		--num-samples 32 --sequence-length 512 --export compressed-tensors
	$(BIN)/fewbit verify $(DEMO)/run
	$(BIN)/fewbit evaluate $(DEMO)/run --text examples/evaluation.txt --sequence-length 512 --max-windows 8 --against $(DEMO)/model
	@echo "report: $(DEMO)/run/report.json"

clean:
	rm -rf $(VENV) $(DEMO) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
