# Every target is one command, which is printed before it runs. RECIPE defaults to demo, so that no target downloads or
# writes gigabytes by default.

PYTHON ?= python3
RECIPE ?= demo
STORE  ?= data/$(RECIPE)
RUN    ?=
PARTS  ?=
SPEECH ?=
OUT    ?= data/real
HOURS  ?=
GRID   ?= demo
ARGS   ?=

VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TINY   := $(BIN)/tinyaudio

# Thread pools that wait busily on shared cores run several times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo transcribe serve extract train-projector eval ablate real bench check test test-all lint format smoke demo-assets clean

help: ## list the targets
	@awk -F ':.*## ' '/^##@ / {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\nVariables: RECIPE=%s STORE=%s RUN=%s GRID=%s ARGS="more options"\n' '$(RECIPE)' '$(STORE)' '$(RUN)' '$(GRID)'

##@ Try
setup: $(READY) ## create .venv with plain pip (every target does this first)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY) ## extract, train, evaluate and transcribe offline, on tiny bundled models
	$(TINY) demo $(ARGS)

transcribe: $(READY) ## transcribe files: make transcribe ARGS="a.wav b.mp3"
	$(TINY) transcribe $(ARGS)

serve: $(READY) ## serve OpenAI's transcription API and a page (needs pip install -e '.[serve]')
	$(TINY) serve $(ARGS)

##@ Train
extract: $(READY) ## stage one: encode a corpus into a feature store (RECIPE, STORE)
	$(TINY) extract --recipe $(RECIPE) --store $(STORE) $(ARGS)

train-projector: $(READY) ## stage two: train the projector from the store (RECIPE, STORE, RUN)
	$(TINY) train --recipe $(RECIPE) --store $(STORE) $(if $(RUN),--run $(RUN)) $(ARGS)

eval: $(READY) ## word error rate of a run on its test split, from raw audio (RUN)
	$(TINY) eval $(or $(RUN),runs/latest) $(ARGS)

ablate: $(READY) ## train every combination of a grid on one store (GRID, STORE)
	$(TINY) ablate $(GRID) --store $(STORE) $(ARGS)

real: $(READY) ## real pretrained parts and human speech, hours (PARTS, SPEECH; OUT, HOURS): docs/real-speech.md
	$(BIN)/python -m pipelines.real.run --parts "$(PARTS)" $(if $(SPEECH),--speech "$(SPEECH)") --out $(OUT) $(if $(HOURS),--hours $(HOURS)) $(ARGS)

##@ Measure
bench: $(READY) ## speed and memory of the store (ARGS=extract, train, transcribe: of the stages)
	$(TINY) bench $(or $(ARGS),store)

##@ Develop
check: lint test ## run the linters and the tests, as CI does

test: $(READY) ## run the tests on two cores, except slow and GPU tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu" $(ARGS)

test-all: $(READY) ## run the slow tests too: full-size models, hundreds of kills
	$(BIN)/python -m pytest -q -m "not gpu" $(ARGS)

lint: $(READY) ## run ruff and strict mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(READY) ## fix and format the code with ruff
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

smoke: $(READY) ## build the wheel and test it in a fresh environment
	$(BIN)/python -m pytest -q -m slow tests/test_wheel.py

demo-assets: $(READY) ## generate the tiny bundled models and corpus again (needs espeak-ng; 45 minutes)
	$(BIN)/python -m pipelines.demo.make --out pipelines/demo --examples pipelines/space/examples

clean: ## remove the environment and caches, but not data/ and runs/
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
