"""Run a merge as a process of its own, watch its time and memory, and compare what two have written."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import pico  # noqa: E402  # pyright: ignore[reportMissingImports]

MERGEKIT_VERSION = "0.1.5"


@dataclass
class Run:
    """What one process did."""

    ok: bool
    seconds: float
    cpu: float = 0.0
    anonymous: int = 0  # peak of RssAnon over the process and its children, bytes
    resident: int = 0  # VmHWM, bytes (mapped files count)
    output: str = ""


def _children(pid: int) -> Iterator[int]:
    yield pid
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _children(int(child))
    except OSError:
        return


def status(pid: int) -> dict[str, int]:
    """RssAnon and VmHWM of a process, in bytes."""
    out = {}
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in ("RssAnon", "VmHWM"):
                out[key] = int(value.split()[0]) * 1024
    except OSError:
        pass
    return out


def run(command: Sequence[str], environment: dict[str, str] | None = None, sample: bool = False) -> Run:
    """Run a command; with ``sample`` read its memory from /proc every 20 ms."""
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        anonymous = resident = 0
        while True:
            pid, code, usage = os.wait4(process.pid, os.WNOHANG if sample else 0)
            if pid:
                break
            found = [status(p) for p in _children(process.pid)]
            anonymous = max(anonymous, sum(s.get("RssAnon", 0) for s in found))
            resident = max(resident, sum(s.get("VmHWM", 0) for s in found))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(code)
        log.seek(0)
        text = log.read().decode(errors="replace")
    return Run(process.returncode == 0, seconds, usage.ru_utime + usage.ru_stime, anonymous, resident, text)


def plait_environment() -> dict[str, str]:
    """The environment with this checkout first on PYTHONPATH."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def run_mergekit(python: str, recipe: Path, out: Path, sample: bool = False) -> Run:
    """mergekit-yaml RECIPE OUT of the given environment, on the CPU."""
    command = [str(Path(python).parent / "mergekit-yaml"), str(recipe), str(out), "--device", "cpu", "--quiet"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return run(command, {**environment, "HF_HUB_OFFLINE": "1"}, sample)


def run_plait(recipe: Path, out: Path, options: Sequence[str] = (), sample: bool = False) -> Run:
    """python -m plait merge RECIPE OUT."""
    command = [sys.executable, "-m", "plait", "merge", str(recipe), str(out), *options]
    return run(command, plait_environment(), sample)


def layout(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor of a checkpoint."""
    return {name: (tuple(t.shape), str(t.dtype)) for name, t in pico.read(folder).items()}


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest max|a-b| / max|b| over the tensors both have, and the tensor's name."""
    worst, where = 0.0, "-"
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = ours[name].double(), theirs[name].double()
        if a.shape != b.shape:
            return math.inf, name
        if not a.numel():
            continue
        scale = float(b.abs().max())
        gap = float((a - b).abs().max())
        relative = gap / scale if scale > 0 else (0.0 if gap == 0 else math.inf)
        if math.isnan(relative):
            relative = math.inf
        if relative > worst:
            worst, where = relative, name
    return worst, where


def short(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else "no output")[:150]


def mergekit_python(arguments: argparse.Namespace) -> str:
    """The interpreter of an environment with mergekit; made in the cache folder when none was named."""
    if arguments.mergekit_python:
        return arguments.mergekit_python
    cache = Path(arguments.cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "plait")
    venv = cache / f"mergekit-{MERGEKIT_VERSION}"
    python = venv / "bin" / "python"
    if not (venv / "bin" / "mergekit-yaml").exists():
        print(f"installing mergekit {MERGEKIT_VERSION} into {venv}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q", *arguments.pip_option]
        # Our own torch first, so that both tools run on one build and no other is fetched.
        subprocess.run([*pip, f"torch=={torch.__version__.split('+')[0]}"], check=True)
        subprocess.run([*pip, f"mergekit=={MERGEKIT_VERSION}"], check=True)
    return str(python)
