# make demo: from a fresh clone to results/pbmc68k/report.html.   make test: every check that CI runs.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONHASHSEED ?= 0
export MPLBACKEND = Agg

.PHONY: demo test lint dry-run unit workflow slow format requirements clean

demo: .venv/ready
	$(BIN)/snakemake --cores all
	@echo "Open results/pbmc68k/report.html"

test: lint dry-run unit workflow

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

dry-run: .venv/ready
	for target in all models census corpus embeddings; do $(BIN)/snakemake --dry-run $$target --quiet all || exit 1; done

unit: .venv/ready
	$(BIN)/python -m pytest -q tests/unit tests/real

workflow: .venv/ready
	$(BIN)/python -m pytest -q tests/workflow

# Slow checks are run by name: make slow
slow: .venv/ready
	$(BIN)/python -m pytest -q -m slow tests

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow

requirements: .venv/ready
	$(BIN)/python envs/requirements.py

clean:
	rm -rf results logs .snakemake
