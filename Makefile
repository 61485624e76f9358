# Needs Python 3.11 or later with pip; everything else goes into .venv.
PYTHON ?= python3
MARK ?= not slow and not gpu
WORKERS ?= 0
KILLS ?= 20
SECONDS ?= 60
DAMAGES ?= 500
BIN := .venv/bin

.PHONY: demo test torture check fuzz clean

demo: .venv/installed   ## prepare, train, sample and plot, in some minutes
	$(BIN)/folio demo

test: .venv/installed   ## the fast tests; MARK="not gpu" runs the slow ones too; WORKERS=2: two at a time
	$(BIN)/python -m pytest -m "$(MARK)" -n $(WORKERS)

torture: .venv/installed  ## kills training and preparation KILLS times at random, and compares the results
	PYTHONPATH=.:tests $(BIN)/python -m torture $(if $(REPLAY),--replay="$(REPLAY)",--kills=$(KILLS) --seed=$(SEED))

check: .venv/installed  ## lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

fuzz: .venv/installed   ## DAMAGES to runs and data sets, then random input for every reader for SECONDS
	$(BIN)/python tests/torture/damage.py --damages=$(DAMAGES)
	$(BIN)/python tests/torture/fuzz.py --seconds=$(SECONDS)

clean:                  ## removes the venv and what was built; data and runs stay
	rm -rf .venv build dist *.egg-info

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
