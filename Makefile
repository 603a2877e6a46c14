# Every target is one command, printed before it runs. RECIPE defaults to demo, so that nothing here downloads or writes
# gigabytes unless told to.

PYTHON ?= python3
RECIPE ?= demo
STORE  ?= data/$(RECIPE)
RUN    ?=
GRID   ?= demo
ARGS   ?=

VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TINY   := $(BIN)/tinyaudio

# Two thread pools that wait busily on two shared cores run several times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format extract train-projector eval transcribe ablate bench demo-assets smoke clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: RECIPE=$(RECIPE) STORE=$(STORE) RUN=$(RUN) GRID=$(GRID) ARGS='more options'"

setup: $(READY) ## build .venv with plain pip (the other targets do it by themselves)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY) ## the main job, offline: extract, train, evaluate and transcribe on the bundled corpus
	$(TINY) tour $(ARGS)

test: $(READY) ## the test suite on two cores, without the slow and GPU tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu" $(ARGS)

test-all: $(READY) ## the slow tests too: full-size models, hundreds of kills
	$(BIN)/python -m pytest -q -m "not gpu" $(ARGS)

lint: $(READY) ## ruff and strict mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(READY) ## rewrite the code as `make lint` wants it
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

extract: $(READY) ## stage one: encode a corpus into a feature store (RECIPE, STORE)
	$(TINY) extract --recipe $(RECIPE) --store $(STORE) $(ARGS)

train-projector: $(READY) ## stage two: train the projector from the store (RECIPE, STORE, RUN)
	$(TINY) train --recipe $(RECIPE) --store $(STORE) $(if $(RUN),--run $(RUN)) $(ARGS)

eval: $(READY) ## word errors of a run on its test split, from raw audio (RUN)
	$(TINY) eval $(or $(RUN),runs/latest) $(ARGS)

transcribe: $(READY) ## transcribe files: make transcribe ARGS="a.wav b.mp3"
	$(TINY) transcribe $(ARGS)

ablate: $(READY) ## train every combination of a grid on one store (GRID, STORE)
	$(TINY) ablate $(GRID) --store $(STORE) $(ARGS)

bench: $(READY) ## speed and memory of the store, as ratios side by side (ARGS="extract", "train", ...)
	$(TINY) bench $(or $(ARGS),store)

demo-assets: $(READY) ## make the bundled stand-ins again (needs espeak-ng; three quarters of an hour)
	$(BIN)/python -m pipelines.demo.make --out pipelines/demo --examples pipelines/space/examples

smoke: $(READY) ## build the wheel and try it in a fresh environment
	$(BIN)/python -m pytest -q -m slow tests/test_wheel.py

clean: ## remove the environment and caches; data/ and runs/ stay
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
