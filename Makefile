# make setup | demo | test | lint | experts | bench. Everything is installed into .venv here.
VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= python3
READY := $(VENV)/.ready

.PHONY: setup demo test lint experts bench clean

setup: $(READY)

# torch first and alone: what depends on it must not pull another build of it in.
$(READY): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -c constraints.txt torch
	$(PY) -m pip install --quiet -c constraints.txt -e ".[demo,test,dev]"
	touch $(READY)

demo: setup
	$(PY) examples/vision_demo/demo.py

test: setup
	$(PY) -m pytest

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

experts: setup
	$(PY) examples/vision_demo/train_experts.py

bench: setup
	$(PY) bench/against_mergekit.py

clean:
	rm -rf $(VENV) demo-output
