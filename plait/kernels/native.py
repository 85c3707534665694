"""Compiled loops, found in the cache or made there: numba compiles them once, llvmlite loads them in milliseconds."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

WORTH = 1 << 28
"""Bytes of input from which compiling (some ten seconds, once) is worth it."""
OFF = "PLAIT_KERNELS"
"""Set to 0, this environment variable leaves all work to torch."""

_lock = threading.Lock()


class Loops:
    """The compiled entries. Calls release the GIL."""

    def __init__(self, content: bytes) -> None:
        import llvmlite.binding as llvm

        length = int.from_bytes(content[:8], "little")
        header, code = json.loads(content[8 : 8 + length]), content[8 + length :]
        if hashlib.sha256(code).hexdigest() != header["sha256"]:
            raise ValueError("the compiled loops are damaged")  # they would be run as they are
        names: Mapping[str, str] = header["names"]
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
        self._engine: Any = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        self._engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
        entries = {name: kind(self._engine.get_function_address(symbol)) for name, symbol in names.items()}
        self.merge, self.magnitudes, self.tally = entries["merge"], entries["magnitudes"], entries["tally"]
        self.pick, self.votes, self.norms, self.prune = (entries[name] for name in ("pick", "votes", "norms", "prune"))
        self.guess, self.patch, self.product = entries["guess"], entries["patch"], entries["product"]


def loops(work: int = 0) -> Loops | None:
    """The compiled loops, or None without a compiler. `work`: bytes of input; compiled now if it is worth it."""
    if os.environ.get(OFF) == "0":
        return None
    with _lock:
        found = _loaded()
        if found is None and work >= WORTH and _compile():
            _loaded.cache_clear()
            found = _loaded()
        return found


@cache
def _loaded() -> Loops | None:
    if importlib.util.find_spec("llvmlite") is None:
        return None
    try:
        return Loops(_path().read_bytes())
    except (OSError, ValueError, KeyError, RuntimeError):
        return None


def _compile() -> bool:
    """Compile in a process of its own; whether it worked. A failure is remembered for this version of everything."""
    path = _path()
    failed = path.with_suffix(".failed")
    if importlib.util.find_spec("numba") is None or failed.exists():
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", "plait.kernels.build", str(path)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            failed.write_text(done.stderr[-10_000:])
        return done.returncode == 0
    except OSError:
        return False


@cache
def _path() -> Path:
    """Where the object for these sources, these compilers and this processor is."""
    import llvmlite.binding as llvm

    from plait.places import cache_folder

    digest = hashlib.sha256()
    for name in ("job.py", "memory.py", "stages.py", "rows.py", "sift.py", "loops.py", "build.py"):
        digest.update((Path(__file__).parent / name).read_bytes())
    for package in ("numba", "llvmlite"):
        try:
            digest.update(version(package).encode())
        except PackageNotFoundError:
            digest.update(b"none")
    digest.update(f"{llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}".encode())
    return cache_folder() / "kernels" / f"loops-{digest.hexdigest()[:20]}.o"
