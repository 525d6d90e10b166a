# Whatever needs .venv sets the machine up first; the check that it already is takes well under a second.

BIN := .venv/bin
WORKERS ?= 2

# One thread per process: the tests start several processes, and small tensors lose more to threads than they gain.
# numba is the exception, because FFCV refuses more loader threads than numba was started with.
# And what they import is compiled once, whatever the shell says: they start hundreds of interpreters.
PROCESSES := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=4

# Tests save checkpoints and runs of MLflow, and each fsync and each commit waits for the disk: 4 ms and 11 ms on a
# virtual one. Memory, where there is room in it and programs may be started from it, makes nobody wait.
IN_MEMORY = $(shell findmnt -fbno AVAIL,OPTIONS /dev/shm | awk '$$1 > 4e9 && !/noexec/ {print "PYTEST_DEBUG_TEMPROOT=/dev/shm"}')

# Reading the other 300 files takes each process of the tests 15 s.
DISTRIBUTED = $(shell grep -rl --include=*.py pytest.mark.distributed tests)

.DEFAULT_GOAL := help
.PHONY: help setup pictures browser tools demo docs check format test test-full test-gpu audit clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## system packages, .venv, the package and what it needs; safe to repeat
	@infra/setup.sh

pictures: ## the photographs that `spiketrain write stamps` is made of: three packages of Debian, 260 MB
	@infra/setup.sh --pictures

browser: ## the browser that tests open reports in: Debian's chromium
	@infra/setup.sh --browser

tools: ## what tests of infra/ need: Debian's shellcheck, docker-compose, promtool and kustomize
	@infra/setup.sh --tools

demo: setup ## write Fashion-MNIST, train by three rules on two workers (WORKERS=N), compare
	$(BIN)/spiketrain write fashion --out data/fashion --existing keep
	$(BIN)/spiketrain launch recipes/compare/fashion_demo.py --workers $(WORKERS) --device cpu

docs: setup ## the documentation site, docs/_build/html/index.html; warnings are errors, and three notebooks run
	$(PROCESSES) $(BIN)/python -m sphinx -W --keep-going -n -q docs docs/_build/html

check: setup ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: setup ## rewrite what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Distributed tests three at a time on two cores: most wait for processes that start, and cores would be idle.
test: setup browser tools ## quick and distributed tests; installs chromium, shellcheck, docker-compose, promtool and kustomize
	$(PROCESSES) $(IN_MEMORY) $(BIN)/pytest -m "not full and not distributed and not gpu" -n 2 --dist loadfile
	$(PROCESSES) $(IN_MEMORY) $(BIN)/pytest -m "distributed and not full and not gpu" -n 3 --dist loadfile $(DISTRIBUTED)

test-full: setup tools ## the tests that take minutes, as root; installs PostgreSQL, Slurm's daemons and iproute2
	@infra/setup.sh --servers
	$(PROCESSES) $(BIN)/pytest -m full

test-gpu: setup ## the tests that need an NVIDIA GPU
	$(PROCESSES) $(BIN)/pytest -m gpu tests/gpu

audit: setup ## known holes in the releases of requirements.lock, asked of PyPI (not of a mirror), by pip-audit
	@test -x .audit/bin/pip-audit || { $(BIN)/python -m venv .audit && .audit/bin/python -m pip install --quiet pip-audit; }
	.audit/bin/pip-audit --strict --require-hashes --disable-pip --requirement requirements.lock

clean: ## caches and builds; keeps .venv, data and runs
	rm -rf build dist docs/_build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
