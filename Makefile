# `make demo` and `make test` need nothing but Python 3.10 or newer: they make .venv and install into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# A detector of the package, from a finished run: $(call ship,RUN,NAME)
ship = $(BIN)/python -c "import torch; from ats_detr import Detector; \
	Detector.from_checkpoint('$(1)').save('ats_detr/shipped/$(2)', dtype=torch.bfloat16)"

.PHONY: demo shapes trees test check lint format typecheck docs hub clean

demo: $(VENV)/.installed  ## a gallery, then the training of the quickstart: eight minutes on two cores
	$(BIN)/ats-detr predict --checkpoint shapes --sample --out predictions
	$(BIN)/python train.py --config configs/quickstart.yaml

test: $(VENV)/.installed-dev  ## the default tests: no GPU, no network
	$(BIN)/python -m pytest

check: lint typecheck test

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.installed-dev
	$(BIN)/mypy

docs: $(VENV)/.installed-docs  ## the documentation with the API reference, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

shapes: $(VENV)/.installed  ## the detector that the package contains, from runs/quickstart
	$(BIN)/ats-detr calibrate quickstart data/quickstart/*/val2017
	$(call ship,quickstart,shapes)

trees: $(VENV)/.installed  ## the detector of trees that the package contains, from runs/trees
	$(call ship,trees,trees)

hub:  ## the operator as a repository of the `kernels` library, in build/hub
	$(PYTHON) hub/build.py

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV); PyTorch is large, this takes a few minutes"
	@$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV) with the extra '$*'; PyTorch is large, this takes a few minutes"
	@$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .hypothesis
