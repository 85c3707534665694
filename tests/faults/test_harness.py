"""The harnesses of `make faults` and `make determinism`, for a few seconds each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from faults.determinism import show

HERE = Path(__file__).parent


def call(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(HERE / script), *words], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_kills() -> None:
    run = call("kills.py", "--quick", "--kills", "6")
    assert run.returncode == 0, run.stdout + run.stderr
    last = run.stdout.strip().splitlines()[-1]
    kills, resumed = (int(word) for word in last.split() if word.isdigit())
    assert kills == resumed >= 6


def test_one_digest() -> None:
    run = call("determinism.py", "--quick")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 with more than one digest" in run.stdout


def test_other_digests_are_seen() -> None:
    assert show({("ties", "cpu"): {"1 thread": {"a"}, "2 threads": {"a"}}}) == 0
    assert show({("ties", "cpu"): {"1 thread": {"a"}, "2 threads": {"b"}}}) == 1
    assert show({("ties", "cpu"): {"1 thread": {"a"}, "hash seed": {"a", "b"}}}) == 1
    assert show({("ties", "cpu"): {"failed: why": {""}}}) == 1
    assert show({("wemoe", "cpu"): {"1 thread": {"a"}, "fit: hash seed": {"c", "d"}}}) == 1
    assert show({("wemoe", "cpu"): {"1 thread": {"a"}, "fit: hash seed": {"c"}, "fit: killed": {"d"}}}) == 1
    assert show({("wemoe", "cpu"): {"1 thread": {"a"}, "fit: 1 thread": {"c"}, "fit: 2 threads": {"d"}}}) == 0
