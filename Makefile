# Everything runs in .venv, which the first target makes. ARGS are options of the demo or of the benchmark, as in
# make demo ARGS=--quick
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install test lint demo bench bench-record clean

install: $(VENV)/.dev

# The package in place, with one of pyproject.toml's extras; again after an edit of what is compiled.
$(VENV)/.dev $(VENV)/.demo: $(VENV)/.%: pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/*/*)
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[$*]" --constraint constraints.txt
	echo "$(FASTKD_CUDA_ARCHS)" > $@

# Who asks for other GPUs than the last time gets them.
ifneq ($(FASTKD_CUDA_ARCHS),$(if $(FASTKD_CUDA_ARCHS),$(shell cat $(VENV)/.dev 2>/dev/null)))
.PHONY: $(VENV)/.dev
endif

# The demo does not run the CUDA part, which takes minutes to compile.
$(VENV)/.demo: export FASTKD_CUDA_ARCHS ?= none

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(or $(wildcard $(VENV)/.dev),$(VENV)/.demo)
	$(BIN)/python -m fastkd demo $(ARGS)

bench: install
	$(BIN)/python -m fastkd bench $(ARGS)

# Record this machine's figures, and write them into the documentation.
bench-record: install
	$(BIN)/python -m fastkd bench --device cpu --out benchmarks/results/cpu-$(shell uname -m).json
	$(BIN)/python -m fastkd.bench.cache --out benchmarks/results/cache.json
	$(BIN)/python -m fastkd.bench.docs

clean:
	rm -rf $(VENV) build dist *.egg-info
