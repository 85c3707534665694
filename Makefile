# make setup | demo | test | hostile | fuzz | faults | determinism | ray | licences | suite | lint | experts | bench.
# All is installed into .venv here.
VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= python3
READY := $(VENV)/.ready
READY_RAY := $(VENV)/.ready-ray

.PHONY: setup demo test hostile fuzz faults determinism ray licences suite lint experts bench clean

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

# Every hostile file against the command line, with time and memory: some minutes.
hostile: setup
	$(PY) tests/hostile/attack.py

# FUZZ_SECONDS=600 in all; FUZZ=--guided grows cases by coverage, where atheris is installed.
fuzz: setup
	$(PY) tests/fuzz/run.py $(FUZZ)

licences: setup
	$(PY) tools/licences.py

# Merges on a Ray cluster of this machine: two workers, one of which is killed. Ray is no part of `make test`.
ray: $(READY_RAY)
	$(PY) -m pytest tests/test_ray.py

$(READY_RAY): $(READY)
	$(PY) -m pip install --quiet -c constraints.txt -e ".[ray]"
	touch $(READY_RAY)

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
	$(PY) bench/speed.py --mergekit linear ties
	$(PY) bench/against_mergekit.py

# 200 kills of real merges, fits and routed builds at random moments; every one must go on to the same bytes.
faults: setup
	$(PY) tests/faults/kills.py --kills 200

# Every method, merged in every way that must not matter: one digest each.
determinism: setup
	$(PY) tests/faults/determinism.py

clean:
	rm -rf $(VENV) demo-output suite-output
