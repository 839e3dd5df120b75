# Seedbed: make help lists the targets. Every target first makes .venv when it is missing or out of date.

PYTHON ?= python3
CONFIG ?= pipelines/configs/demo.toml
OUTPUT ?= runs/demo
TRAIN_CONFIG ?= pipelines/configs/train/demo.toml
TRAIN_OUTPUT ?= runs/train
EVALUATE_CONFIG ?= pipelines/configs/evaluate/demo.toml
EVALUATE_OUTPUT ?= runs/evaluate
ARGS ?=
# Files of tests that run at once. Each may start processes of its own.
TEST_PROCESSES ?= 2

# Extras of pyproject.toml. `gpu` is none of them: it puts faiss-gpu in the place of faiss-cpu. Both hold the package
# faiss, so both must be gone before one comes. On a machine with an NVIDIA GPU: make setup EXTRAS=gpu,dev
EXTRAS ?= dev

BIN := .venv/bin
COMMA := ,
EMPTY :=
SPACE := $(EMPTY) $(EMPTY)
PIP_EXTRAS := $(subst $(SPACE),$(COMMA),$(filter-out gpu,$(subst $(COMMA),$(SPACE),$(EXTRAS))))
HAS_GPU := $(filter gpu,$(subst $(COMMA),$(SPACE),$(EXTRAS)))

.DEFAULT_GOAL := help
.PHONY: help setup curate train evaluate test test-quick test-slow test-cluster test-demo check format bench bench-gpu clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 14

setup: .venv/ready  ## Make .venv and install everything, from nothing

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Seedbed needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Set PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.$(if $(PIP_EXTRAS),[$(PIP_EXTRAS)])'
	$(if $(HAS_GPU),$(BIN)/python -m pip uninstall --quiet --yes faiss-cpu faiss-gpu)
	$(if $(HAS_GPU),$(BIN)/python -m pip install --quiet --constraint constraints.txt faiss-gpu)
	@touch $@

curate: setup  ## Build a corpus: CONFIG=... OUTPUT=... ARGS='--plan', '--replace', '--runner inline', ...
	$(BIN)/python -m pipelines.curate --config "$(CONFIG)" --output "$(OUTPUT)" $(if $(filter curate,$(MAKECMDGOALS)),$(ARGS))

train: curate  ## Train on the corpus that make curate wrote: TRAIN_CONFIG=... TRAIN_OUTPUT=... ARGS=...
	$(BIN)/python -m pipelines.train --config "$(TRAIN_CONFIG)" --output "$(TRAIN_OUTPUT)" --images "$(OUTPUT)/ingest" \
		--set data.path="$(OUTPUT)/corpus" $(if $(filter train,$(MAKECMDGOALS)),$(ARGS))

evaluate: train  ## Evaluate what make train trained beside others: EVALUATE_CONFIG=... EVALUATE_OUTPUT=...
	$(BIN)/python -m pipelines.evaluate --config "$(EVALUATE_CONFIG)" --output "$(EVALUATE_OUTPUT)"

test: setup  ## Run the tests, as CI runs them
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile -m "not demo and not slow and not cluster" $(ARGS)

test-quick: setup  ## Run the tests that the changes touch, for 90 seconds, the nearest first: ARGS='--since COMMIT'
	$(BIN)/python -m tests.quick --processes $(TEST_PROCESSES) $(ARGS)

test-slow: setup  ## Run the tests that take minutes and need no data: compiled models, mutated images, SLURM
	$(BIN)/python -m pytest -m slow $(ARGS)

test-cluster: curate  ## Inject faults into a cluster of three hosts on this machine (root, 55 minutes); fills the fault table
	rm -f runs/faults.jsonl
	$(BIN)/python -m pytest -m cluster $(ARGS)
	$(BIN)/python -m tests.cluster.fault_table

test-demo: evaluate  ## Check the figures of the demo: corpus, training, evaluations
	$(BIN)/python -m pytest -m demo $(ARGS)

check: setup  ## Lint and types; never writes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## Fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: curate  ## Run every benchmark: rows with the peer, the ratio, the machine and the date
	$(BIN)/python -m pipelines.bench $(ARGS)

bench-gpu: setup  ## Measure what only a GPU can show, in nine minutes: ARGS='--images FOLDER', or ARGS=--tiny on a CPU
	$(BIN)/python -m pipelines.bench.gpu $(ARGS)

clean:  ## Remove .venv and caches; data and runs stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache *.egg-info
