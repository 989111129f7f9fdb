# Everything runs in .venv, which the first target makes; what needs the training frameworks, in .venv-integrations.
# ARGS are options of the demo or of the benchmark, as in
# make demo ARGS=--quick
VENV ?= .venv
BIN := $(VENV)/bin
INTEGRATIONS := $(VENV)-integrations

.PHONY: install test test-integrations lint demo bench bench-record bench-integrations docs dist smoke clean

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

# The frameworks at the versions of their constraints, where the CUDA part is not needed.
$(INTEGRATIONS)/.installed: pyproject.toml setup.py tests/integrations/constraints.txt $(wildcard csrc/* csrc/*/*)
	test -x $(INTEGRATIONS)/bin/python || python3 -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/pip install --quiet --upgrade pip
	FASTKD_CUDA_ARCHS=none FASTKD_REQUIRE= $(INTEGRATIONS)/bin/pip install --quiet --editable ".[integrations]" \
	    --constraint tests/integrations/constraints.txt
	touch $@

test-integrations: $(INTEGRATIONS)/.installed
	$(INTEGRATIONS)/bin/python -m pytest -m integration -W default -q tests/integrations

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
	$(BIN)/python -m fastkd.bench.tails --out benchmarks/results/tails.json
	for task in text layers; do \
	    $(BIN)/python -m fastkd demo --device cpu --task $$task || exit; \
	    for kind in json png; do cp fastkd-demo/$$task.$$kind benchmarks/results/demo-$$task.$$kind; done \
	done
	$(BIN)/python -m fastkd.bench.docs

bench-integrations: install $(INTEGRATIONS)/.installed
	$(INTEGRATIONS)/bin/python -m fastkd.bench.integrations --out benchmarks/results/integrations.json
	$(BIN)/python -m fastkd.bench.docs

docs: install
	$(BIN)/python -m sphinx -W --keep-going -q docs build/docs
	@echo "build/docs/index.html"

# What is released. The wheel has the CPU part; CUDA's is compiled where the sdist is installed, for the GPUs there.
dist: install
	rm -rf dist
	FASTKD_CUDA_ARCHS=none FASTKD_REQUIRE=cpu $(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# What `make dist` made, tried in a fresh environment, as in
# make smoke PYTHON=python3.10 TORCH=2.6
PYTHON ?= python3
smoke:
	rm -rf build/smoke
	$(PYTHON) -m venv build/smoke
	FASTKD_CUDA_ARCHS=none FASTKD_REQUIRE=cpu build/smoke/bin/pip install --quiet dist/*.tar.gz \
	    "torch$(if $(TORCH),==$(TORCH).*)" mypy numpy
	cd build && FASTKD_REQUIRE=cpu smoke/bin/python ../tests/smoke.py

clean:
	rm -rf $(VENV) $(INTEGRATIONS) build dist *.egg-info
