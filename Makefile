# make fit    train SASRec with Muon on synthetic sequences (installs everything into .venv first)
# make test   lint, type-check, import contracts, tests
# make docs   the documentation, into docs/_build; a warning is an error
# make bench  optimizer step times, ours against torch.optim, interleaved; what the monitors cost; beam search of the generative recommenders
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Two spinning OpenMP threads on busy cores cost tenfold: one thread a process unless told otherwise.
export OMP_NUM_THREADS ?= 1

.PHONY: fit test lint unit docs bench clean

fit: $(VENV)/installed
	$(BIN)/python -m examples.recsys fit -c configs/model/sasrec.yaml -c configs/data/synthetic.yaml -c configs/preset/sasrec_synthetic.yaml

test: lint unit

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A process for each core; tests of one file stay together, which share what takes long to make, until a process is idle.
unit: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

docs: $(VENV)/installed
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build

bench: $(VENV)/installed
	$(BIN)/python -m tests.benchmarks.optimizer_step
	$(BIN)/python -m tests.benchmarks.monitors
	$(BIN)/python -m tests.benchmarks.beam_search

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[examples,dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build docs/generated .mypy_cache .pytest_cache .ruff_cache .import_linter_cache lightning_logs logs
