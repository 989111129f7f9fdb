# Everything runs in .venv, which the first target makes.
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install test lint demo bench bench-record clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[dev]" --constraint constraints.txt
	touch $@

test: install
	$(BIN)/python -m pytest -n 2 -q

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: install
	$(BIN)/python -m fastkd demo

bench: install
	$(BIN)/python -m fastkd bench

# Record this machine's figures, and write them into the documentation.
bench-record: install
	$(BIN)/python -m fastkd bench --device cpu --out benchmarks/results/cpu-$(shell uname -m).json
	$(BIN)/python -m fastkd.bench.docs

clean:
	rm -rf $(VENV) build dist *.egg-info
