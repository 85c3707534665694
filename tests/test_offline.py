"""Local files need no network, `--offline` forbids it, and nothing is told to anybody."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from mini_suite import MiniSuite

from plait import cli

HUB = "import plait, sys; sys.argv = ['plait', *sys.argv[1:]]; from plait.cli import main; main()"
LISTEN = """
import socket
def refuse(*words, **more):
    print("NETWORK", words[:2], flush=True)
    raise OSError("no network in this test")
socket.getaddrinfo = socket.create_connection = refuse
socket.socket.connect = socket.socket.connect_ex = refuse
"""


def test_local_files_need_no_network(
    llama: dict[str, Path], mini: MiniSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def refuse(*words: Any, **more: Any) -> None:
        asked.append("".join(traceback.format_stack()))
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))
    suite, base, one = mini.root / "suite.yaml", llama["base"], llama["one"]
    for words in (
        ["merge", "-q", "-m", "ties", "--base", base, "-e", one, tmp_path / "out"],
        ["inspect", "-q", "--base", base, one],
        ["suite", "show", suite],
        ["eval", "-q", mini.base, "--suite", suite, "--task", "tone"],
        [
            "compare",
            "-q",
            "average",
            "--suite",
            suite,
            "--task",
            "tone",
            "--task",
            "count",
            "-o",
            tmp_path / "compared",
        ],
    ):
        monkeypatch.setattr(sys, "argv", ["plait", *map(str, words)])
        cli.main()
    assert not asked, asked[0]


def test_offline_is_honoured(tmp_path: Path) -> None:
    command = ["merge", "--offline", "-m", "linear", "-e", "someone/some-model", str(tmp_path / "out")]
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {"HF_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", LISTEN + HUB, *command], env=environment, text=True, capture_output=True, timeout=120
    )
    assert run.returncode == 3, run.stderr
    assert "someone/some-model: HF_HUB_OFFLINE is set, and the cache does not hold it" in run.stderr
    assert "NETWORK" not in run.stdout


def test_telemetry_is_off() -> None:
    code = "import plait, huggingface_hub.constants as c; print(c.HF_HUB_DISABLE_TELEMETRY)"
    environment = {key: value for key, value in os.environ.items() if "TELEMETRY" not in key}
    run = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, timeout=120)
    assert run.stdout.strip() == "True", run.stderr
