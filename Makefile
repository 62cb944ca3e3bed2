# Each target makes the virtual environment first, so any of them works on a fresh clone.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
EXECUTE := $(BIN)/jupyter nbconvert --to notebook --execute --log-level=WARN \
	--ExecutePreprocessor.timeout=-1 --ExecutePreprocessor.record_timing=False \
	--ExecutePreprocessor.store_widget_state=False

.PHONY: help course test faults lint lab data publish clean

help:
	@echo "make course   run every notebook on the drawn sample; results in build/"
	@echo "make test     unit tests and every notebook as a test, on the drawn sample"
	@echo "make lab      open the course in JupyterLab"
	@echo "make data     fetch UTKFace, or take FROM=folder-or-archive, and verify it"
	@echo "make publish  run every notebook on UTKFace, write the committed outputs and results"
	@echo "make faults   the tests of what can go wrong, and their table in the README"
	@echo "make lint     check the code's style"
	@echo "make clean    remove build/ and the drawn sample"

$(READY): requirements.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "No '$(PYTHON)' found: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$("$(PYTHON)" --version) is too old: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -m venv $(VENV) || { echo "'$(PYTHON) -m venv' failed: on Debian and Ubuntu install the package python3-venv"; exit 1; }
	@echo "Installing the packages into $(VENV) (some GB with PyTorch; a few minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	@touch $@

course: $(READY)
	@mkdir -p build/notebooks
	@for notebook in $(NOTEBOOKS); do \
		echo "Running $$notebook ..."; \
		AGE_FACES=sample AGE_PUBLISH=0 $(EXECUTE) --output-dir build/notebooks "$$notebook"; \
	done
	@$(BIN)/jupyter nbconvert --to html --log-level=ERROR build/notebooks/*.ipynb
	@echo "Done. Executed notebooks: build/notebooks/*.html (open in a browser). Figures: build/figures/."

test: $(READY)
	@AGE_FACES=sample AGE_PUBLISH=0 $(BIN)/python -m pytest tests notebooks --nbval-lax \
		--nbval-cell-timeout=600 --numprocesses=2 --dist=loadscope $(ARGS)

faults: $(READY)
	@AGE_FACES=sample AGE_PUBLISH=0 $(BIN)/python -m pytest tests -m fault \
		--numprocesses=2 --dist=loadscope $(ARGS)
	@$(BIN)/python -m utils.report

lint: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check utils tests

lab: $(READY)
	@$(BIN)/jupyter lab notebooks

data: $(READY)
	@$(BIN)/python -m utils.sources $(if $(FROM),"$(FROM)") $(ARGS)

publish: $(READY)
	@$(BIN)/python -m utils.colab
	@for notebook in $(NOTEBOOKS); do \
		echo "Publishing $$notebook ..."; \
		AGE_FACES=utkface AGE_PUBLISH=1 $(EXECUTE) --inplace "$$notebook"; \
	done
	@AGE_FACES=utkface AGE_PUBLISH=1 $(BIN)/python -m utils.hero
	@$(BIN)/python -m utils.report
	@echo "Done. Look at the notebooks and at figures/ before you commit them."

clean:
	@rm -rf build data/sample data/cache/sample data/runs/sample
