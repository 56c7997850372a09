# make demo: set up, train one DEFT adapter on all tasks, complete grids with it.
# make test: set up and run the tests.   make check: ruff, mypy, the walls between packages, dead names, spelling, Dockerfiles.
# make gpu: on a machine with a GPU, check its results, try every command, measure; 15 minutes.
# make test-processes: runs of all kinds, also killed, stopped and starved, then resumed; long.
# make test-scripts: every script in scripts/ at its smallest.
# make fuzz N=2000 SEED=7: as many inputs that were spoiled at random, over all commands.
PYTHON ?= python3
TORCH ?= torch==2.13.0
N ?= 300
SEED ?= 1
ONLY ?=
VENV := .venv
SHOWN := canny-to-image,depth-to-image,segmentation-to-image,image-to-depth,image-to-normals,$\
	image-editing,novel-view,object-insertion,colourisation,deblurring,subject-driven
BIN := $(VENV)/bin

.PHONY: demo test test-processes test-scripts fuzz check gpu setup
setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)"
	DS_BUILD_OPS=0 $(BIN)/pip install -q -e ".[dev]"
	touch $@

demo: setup
	test -d runs/demo/adapter || $(BIN)/vcdeft train --tasks all --zero 2 --output runs/demo \
		$$(ls -d runs/demo/checkpoints/step-* >/dev/null 2>&1 && echo --resume)
	test -f runs/demo/grids/grid.json || $(BIN)/vcdeft tasks example $(SHOWN) --output runs/demo/grids
	$(BIN)/vcdeft infer --examples runs/demo/grids/grid.json --adapter runs/demo/adapter --output runs/demo/images
	@echo "look at runs/demo/images/*-sheet.png and runs/demo/sheets"

test: setup
	$(BIN)/python -m pytest

test-processes: setup
	$(BIN)/python -m pytest -m processes tests $(MORE)

test-scripts: setup
	$(BIN)/python -m pytest -m scripts tests $(MORE)

fuzz: setup
	N=$(N) SEED=$(SEED) ONLY=$(ONLY) $(BIN)/python -m pytest -m fuzz tests/fuzz $(MORE)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy integrations/comfyui
	$(BIN)/lint-imports --no-cache
	$(BIN)/vulture
	$(BIN)/codespell
	$(BIN)/hadolint Dockerfile Dockerfile.cpu
	$(BIN)/python scripts/prose.py README.md CONTRIBUTING.md docs/*.md integrations/*/README.md --check

# The next script also runs where the one before it found a fault.
gpu:
	status=0; for script in check_gpu smoke_gpu bench_gpu; do \
		$(PYTHON) scripts/$$script.py --output runs/$$script || status=1; \
	done; exit $$status
