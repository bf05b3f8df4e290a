# Two commands for a newcomer: `make demo` and `make test`. Everything lives in .venv; nothing is installed elsewhere.
PYTHON ?= python3
# The version that CI tests. Without an NVIDIA GPU, Linux gets PyTorch's own CPU build; your package index's otherwise.
TORCH ?= torch==2.13.0
TORCH_CPU := https://download.pytorch.org/whl/cpu
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-long style docs check format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       install and answer real prompts with the embedded model"
	@echo "make test       the tests, 5 to 10 minutes on 2 cores"
	@echo "make test-long  what takes longer; writes tests/report_long.md"
	@echo "make check      format, lint, types (make style), docs and tests: what CI runs"
	@echo "make docs       the documentation as a site, build/site/index.html; fails on dead links"
	@echo "make format     rewrite the sources in the project's format"

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -m venv $(VENV)
	@index=""; \
	if [ "$$(uname)" != Linux ] || command -v nvidia-smi >/dev/null; then \
	  echo "Installing $(TORCH) from your package index into $(VENV) (with CUDA 5.7 GB on disk, without it 1 GB) ..."; \
	elif $(PYTHON) -c 'import urllib.request as r; r.urlopen("$(TORCH_CPU)/torch/", timeout=10)' 2>/dev/null; then \
	  echo "There is no NVIDIA GPU: installing the CPU build of $(TORCH) into $(VENV) (200 MB to fetch, 1 GB on disk) ..."; \
	  index="--extra-index-url $(TORCH_CPU)"; \
	else \
	  echo "There is no NVIDIA GPU, but $(TORCH_CPU) does not answer:"; \
	  echo "installing $(TORCH) from your package index into $(VENV) (1 GB on disk; 5.7 GB if that has only the CUDA build) ..."; \
	fi; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) $$index
	@echo "Installing wedlm and what else it needs (the native library is compiled if there is a C++ compiler) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[serve]"
	@du -sh $(VENV) | awk '{print "Installed: " $$1 " in " $$2}'
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

# Not --quiet, which hides warnings from --strict. The pages fetch nothing from other hosts.
docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	! grep -rnoE '<(script|link|img|iframe)[^>]+(src|href)="?(https?:)?//[^>]*>|url\((https?:)?//[^)]*' build/site \
	  --include='*.html' --include='*.css'

check: style docs test

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info
