# make demo: from a fresh clone to a trained model, its report, and cells described by it.
# make test: lint and all tests but the slow ones. CI runs make slow and make slurm as well.
# make docs: the documentation as a site, in site/.
PYTHON ?= python3
BIN := .venv/bin
DEMO := results/pbmc68k
UV := 0.13.9
export PYTHONHASHSEED ?= 0
export MPLBACKEND = Agg

.PHONY: demo docs test lint dry-run tests unit workflow slow slurm format audit requirements clean

demo: .venv/ready
	@$(BIN)/snakemake all $(DEMO)/unlabelled/pbmc68k.h5ad --cores all || { echo "Failed. If it says that the directory cannot be locked, an earlier run was \
	killed: run $(BIN)/snakemake --unlock, then make demo again; finished steps are kept."; exit 1; }
	PYTHONPATH=workflow/scripts $(BIN)/python -m cell2text annotate $(DEMO)/unlabelled/pbmc68k.h5ad --model $(DEMO)/model --out $(DEMO)/annotated --overwrite
	@echo "Done: open $(DEMO)/report.html and $(DEMO)/annotated/annotate.html in a browser"

test: lint dry-run tests

# uv installs the same pins as pip in a fraction of the time and shows what it does. It does not read pip's settings, so
# wheels that PIP_FIND_LINKS names are handed on. UV_TORCH_BACKEND=cpu avoids the CUDA libraries on machines without a GPU.
.venv/ready: requirements.txt
	@echo "Setting up .venv: about 180 packages, 2.5 GB (6 GB with CUDA)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV)
	$(BIN)/python -m uv pip install --python $(BIN)/python $(addprefix --find-links ,$(PIP_FIND_LINKS)) --requirement requirements.txt
	touch $@

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

dry-run: .venv/ready
	for target in all models census corpus embeddings; do $(BIN)/snakemake --dry-run $$target --quiet all || exit 1; done

# Two processes, each with whole files of tests and one thread
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile

tests: .venv/ready
	$(PYTEST) tests/workflow tests/unit tests/real

unit: .venv/ready
	$(PYTEST) tests/unit tests/real

workflow: .venv/ready
	$(PYTEST) tests/workflow

# Tests of several minutes, which are run by name; those on SLURM have a target of their own.
slow: .venv/ready
	$(PYTEST) -m slow tests --ignore tests/workflow/test_slurm.py

# The tiny workflow on a real SLURM, which starts on this machine. As root, Debian's packages are installed if they are
# missing and there is a network; elsewhere the test is skipped.
SLURM := slurm-wlm munge slurmdbd mariadb-server
slurm: .venv/ready
	@command -v slurmdbd >/dev/null || [ "$$(id -u)" != 0 ] || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	apt-get install -qq --no-install-recommends $(SLURM); } >/dev/null 2>&1 || echo "SLURM cannot be installed here"
	$(BIN)/python -m pytest -q -m slow -rs -s tests/workflow/test_slurm.py

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow

# Compares requirements.txt with the published vulnerabilities of PyPI, over the network. It installs nothing into .venv.
audit: .venv/ready
	$(BIN)/uv tool run pip-audit==2.10.1 --requirement requirements.txt --no-deps --disable-pip --strict

docs: .venv/ready
	$(BIN)/python docs/columns.py
	$(BIN)/mkdocs build
	@echo "Done: open site/index.html in a browser"

requirements: .venv/ready
	$(BIN)/python envs/requirements.py

clean:
	rm -rf results logs .snakemake
