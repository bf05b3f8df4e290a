# Two commands for a newcomer: `make demo` and `make test`. Everything lives in .venv; nothing is installed elsewhere.
PYTHON ?= python3
# The version that CI tests. Whether it is a CPU or a CUDA build is decided by your package index (README, "Install").
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-long style check format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       install and answer real prompts with the embedded model"
	@echo "make test       the tests, 5 to 10 minutes on 2 cores"
	@echo "make test-long  what takes longer; writes tests/report_long.md"
	@echo "make check      format, lint, types (make style) and tests: what CI runs"
	@echo "make format     rewrite the sources in the project's format"

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

demo: $(VENV)/installed
	@$(BIN)/wedlm demo

test: $(VENV)/installed-dev
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile

test-long: $(VENV)/installed-dev
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 -m long --report-long tests/report_long.md

style: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: style test

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info
