# make setup | demo | test | suite | lint | experts | bench | faults | determinism. Everything is installed into .venv here.
VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= python3
READY := $(VENV)/.ready

.PHONY: setup demo test suite lint experts bench faults determinism clean

setup: $(READY)

# torch first and alone: what depends on it must not pull another build of it in.
$(READY): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -c constraints.txt torch
	$(PY) -m pip install --quiet -c constraints.txt -e ".[test,dev]"
	touch $(READY)

demo: setup
	$(PY) examples/vision_demo/demo.py

test: setup
	$(PY) -m pytest

# Builds the two main suites in the user's cache (PLAIT_CACHE says where), then measures the plain methods on both.
suite: setup
	$(VENV)/bin/plait suite build vision
	$(VENV)/bin/plait suite build text
	$(VENV)/bin/plait compare --suite vision --out suite-output/vision
	$(VENV)/bin/plait compare --suite text --out suite-output/text

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

experts: setup
	$(PY) examples/vision_demo/train_experts.py

bench: setup
	$(PY) bench/against_mergekit.py

# 200 kills of real merges, fits and routed builds at random moments; every one must go on to the same bytes.
faults: setup
	$(PY) tests/faults/kills.py --kills 200

# Every method, merged in every way that must not matter: one digest each.
determinism: setup
	$(PY) tests/faults/determinism.py

clean:
	rm -rf $(VENV) demo-output suite-output
