"""Running the real command line in a process of its own that need not load torch again: forked off a warm parent."""

from __future__ import annotations

import hashlib
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PLAIN = ("plait.run", "plait.cli", "plait.show", "plait.show_state", "plait.methods")
WITH_MODELS = ("plait.learn.fit", "plait.routing.build", "transformers.models.bert.modeling_bert",
               "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
               "transformers.models.auto.tokenization_auto", "datasets")  # fmt: skip


UNTIMED = "timing.json"


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Exit code; the negative of the signal that ended it."""
    seconds: float
    told: str
    """Standard error."""


def warm_up(models: bool = True) -> None:
    """Load what the commands load; with `models` also what fits and routed models need.

    No thread may be started here: the process is forked afterwards.
    """
    for name in (*PLAIN, *(WITH_MODELS if models else ())):
        importlib.import_module(name)


def start(words: list[str], told: Path, prepare: Callable[[], None] | None = None) -> int:
    """Fork a process that runs `plait WORDS`; returns its number. What it says goes to the file `told`.

    `prepare` is called in it first: limits, faults, patches.
    """
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        file = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["plait", *words]
        if prepare is not None:
            prepare()
        from plait.cli import main

        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(number: int, told: Path, begun: float) -> Ended:
    """Wait for a process of `start`."""
    _, status = os.waitpid(number, 0)
    return Ended(os.waitstatus_to_exitcode(status), time.monotonic() - begun, told.read_text(errors="replace"))


def call(words: list[str], told: Path, prepare: Callable[[], None] | None = None) -> Ended:
    """Run a command to its end."""
    begun = time.monotonic()
    return wait(start(words, told, prepare), told, begun)


def tree(folder: Path) -> str:
    """SHA-256 over the names and bytes of every file, but for the time that a fit took."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != UNTIMED:
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def often() -> None:
    """Fits save their progress at every step, so that a kill finds some."""
    from plait.learn import loop

    loop._SAVE_SECONDS = 0.0
