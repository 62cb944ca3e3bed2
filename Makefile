# Each target makes the virtual environment first, so any of them works on a fresh clone.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
GRADIO := $(VENV)/.gradio
BOOK   := $(VENV)/.book
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
# Begun first, so that none of them runs alone at the end.
LONGEST := $(filter notebooks/08% notebooks/05%,$(NOTEBOOKS))
# How many notebooks `make course` runs at a time, one thread each: more would wait for each other.
JOBS := $(shell [ "$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)" -gt 1 ] && echo 2 || echo 1)

# Runs the notebook $1 with the options $WRITE of nbconvert and tells how long it took. 255 in $STOP
# keeps xargs from going on after a failure.
define RUN
name=$$(basename "$$1" .ipynb) start=$$SECONDS; log=build/$$name.log
if $(BIN)/jupyter nbconvert --to notebook --execute $$WRITE --ExecutePreprocessor.timeout=-1 \
	--ExecutePreprocessor.record_timing=False --ExecutePreprocessor.store_widget_state=False \
	"$$1" >"$$log" 2>&1
then printf '%-34s %5d s\n' "$$name" $$((SECONDS - start))
else tail -n 25 "$$log" >&2; echo "$$name FAILED after $$((SECONDS - start)) s; more in $$log" >&2; exit $${STOP:-1}
fi
endef
export RUN

.PHONY: help course test lint lab demo book data experiments publish clean

help:
	@echo "make course   run every notebook on the drawn sample; results in build/"
	@echo "make test     unit tests and every notebook as a test, on the drawn sample"
	@echo "make lab      open the course in JupyterLab"
	@echo "make demo     open a page for your own photos in the browser (installs Gradio first)"
	@echo "make book     make a web site of the committed notebooks in build/book/"
	@echo "make data     fetch UTKFace, or take FROM=folder-or-archive, and verify it"
	@echo "make experiments  train what the published run lacks; hours, resumes where it was cut"
	@echo "make publish  run every notebook on UTKFace, write the committed outputs and results"
	@echo "make lint     check the code's style"
	@echo "make clean    remove build/ and the drawn sample"

$(READY): requirements.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "No '$(PYTHON)' found: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$("$(PYTHON)" --version) is too old: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -m venv $(VENV) || { echo "'$(PYTHON) -m venv' failed: on Debian and Ubuntu install the package python3-venv"; exit 1; }
	@echo "Installing the packages into $(VENV) (some GB with PyTorch; a few minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	@touch $@

$(GRADIO): $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "gradio>=6.31,<7"
	@touch $@

$(BOOK): $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "sphinx>=8,<9" "myst-nb>=1.3,<2" \
		"sphinx-book-theme>=1.1,<2" "sphinx-mathjax-offline<1"
	@touch $@

course: $(READY)
	@rm -rf build/notebooks && mkdir -p build/notebooks
	@echo "Running $(words $(NOTEBOOKS)) notebooks on the drawn sample, $(JOBS) at a time ..."
	@printf '%s\n' $(LONGEST) $(filter-out $(LONGEST),$(NOTEBOOKS)) | AGE_FACES=sample AGE_PUBLISH=0 OMP_NUM_THREADS=1 \
		WRITE="--output-dir build/notebooks" xargs -n 1 -P $(JOBS) bash -c "$$RUN" run
	@$(BIN)/jupyter nbconvert --to html --log-level=ERROR build/notebooks/*.ipynb 2>/dev/null
	@echo "Done. Executed notebooks: build/notebooks/*.html (open in a browser). Figures: build/figures/."

test: $(READY)
	@AGE_FACES=sample AGE_PUBLISH=0 $(BIN)/python -m pytest tests notebooks --nbval-lax \
		--nbval-cell-timeout=600 --numprocesses=2 --dist=loadscope $(ARGS)

lint: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check utils tests

lab: $(READY)
	@$(BIN)/jupyter lab notebooks

demo: $(GRADIO)
	@$(BIN)/python -m utils.predict --demo

book: $(BOOK)
	@$(BIN)/python .ci/book.py
	@echo "Done. Open build/book/index.html in a browser."

data: $(READY)
	@$(BIN)/python -m utils.download $(if $(FROM),"$(FROM)") $(ARGS)

experiments: $(READY)
	@$(BIN)/python .ci/experiments.py

publish: experiments
	@mkdir -p build
	@$(BIN)/python .ci/publish.py
	@printf '%s\n' $(NOTEBOOKS) | AGE_FACES=utkface AGE_PUBLISH=1 WRITE=--inplace STOP=255 \
		xargs -n 1 bash -c "$$RUN" run
	@$(BIN)/python .ci/publish.py
	@echo "Done. Look at the notebooks and at figures/ before you commit them."

clean:
	@rm -rf build data/sample data/cache/sample data/runs/sample
