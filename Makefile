# Two commands do everything on a fresh machine with Python 3.11+ and pip: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-all test-gpu lint format tables models notebooks docs picture truth bench bench-peers clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mechscope needs Python 3.11 or later")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# what the documentation site and the notebooks need beside that
.venv/docs: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

demo: .venv/ready
	$(BIN)/mechscope demo

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# one thread per test process: two processes with two threads each would spin against each other on two cores
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

test-all: lint .venv/docs
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m 'not gpu'

# on a machine with a CUDA device
test-gpu: .venv/ready
	$(BIN)/pytest -m gpu

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# docs/tables.md, from the sections of the page
tables: .venv/ready
	$(BIN)/python -m mechscope.report.documentation > docs/tables.md

# docs/models.md, from tiny models of every family that transformers knows; some minutes
models: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.matrix > docs/models.md

# the notebooks of docs/notebooks, executed again; five minutes
notebooks: .venv/docs
	$(BIN)/python -m website.notebooks

# build/site, without a network; the gallery shows the figures of a run
GALLERY ?= $(wildcard runs/demo)
docs: .venv/docs
	MECHSCOPE_GALLERY=$(GALLERY) NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/mkdocs build --strict

# docs/images/report.png, the first screen of a run's page, for README.md; needs Chromium
CHROMIUM ?= chromium
picture:
	$(CHROMIUM) --headless --no-sandbox --hide-scrollbars --virtual-time-budget=8000 --window-size=1180,760 \
	  --screenshot=$(CURDIR)/docs/images/report.png file://$(abspath $(GALLERY))/report.html

# docs/calibration.md, from a full run of `mechscope calibrate`: hours on two cores; a run that was stopped goes on
truth: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/mechscope calibrate --form full --processes 2 --out runs/calibration
	$(BIN)/python -m mechscope.report.calibration runs/calibration > docs/calibration.md

# about an hour on two quiet cores, a third of it for peers; what is measured goes into docs/benchmarks.md
bench: .venv/ready
	$(BIN)/python -m benchmarks run --out benchmarks/results/small.json
	$(BIN)/python -m benchmarks table benchmarks/results/small.json

# the peers' packages in an environment of their own, one by one: what cannot be installed is named and then left out
bench-peers:
	$(PYTHON) -m venv .venv-bench
	$(PYTHON) -m benchmarks.install .venv-bench/bin/python
	$(PYTHON) -m venv .venv-bench-older
	$(PYTHON) -m benchmarks.install .venv-bench-older/bin/python bench-older

clean:
	rm -rf .venv .venv-bench .venv-bench-older build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
