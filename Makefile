# demo and test work on a fresh machine with Python >= 3.11, make and a C compiler; no GPU needed.
PYTHON ?= python3
BIN := .venv/bin
# A process a core, up to 4, each with one thread; a file's tests stay together, for what they share.
# Long files begin first (tests/conftest.py).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test quick campaigns runtimes lint docs clean

demo: .venv/.demo
	$(BIN)/bitknap quantize reference:mixtral --budget 2.5bpw -o build/demo --overwrite
	$(BIN)/bitknap evaluate build/demo --reference reference:mixtral --uniform --tokens 16384

test: .venv/.test
	$(PYTEST)

# The tests that are not marked slow, to run between two changes.
quick: .venv/.test
	$(PYTEST) -m "not slow and not runtime and not campaign"

# Every benchmark in short, every page of the documentation, the wheel, and whole jobs.
campaigns: .venv/.test
	$(PYTEST) -m campaign

# The tests that run other runtimes, such as vLLM, each in an environment of its own, made once and
# kept (benchmarks/runtimes/environments.py): some gigabytes, and minutes the first time.
runtimes: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m runtime

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

# The site, in build/docs; any warning fails. Serve it with: python -m http.server -d build/docs
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf .venv build

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.test: .venv/.demo
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

.venv/.docs: .venv/.demo
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@
