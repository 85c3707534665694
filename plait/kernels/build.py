"""Compiles the loops for this processor and writes one object file that llvmlite alone can load.

    python -m plait.kernels.build FILE

Runs in a process of its own: importing numba and compiling take seconds, and neither belongs into a merge.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

_LIBRARY = {"memcpy", "memset", "memmove"}
"""What optimised code may call besides LLVM's own intrinsics: found in any process."""


def build(path: Path) -> None:
    """Compile into `path`, which appears whole; its name table goes beside it. RuntimeError if code is left over."""
    from plait.kernels.loops import ENTRIES

    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, jit=True
    )
    names, modules = {}, []
    for name, function in ENTRIES.items():
        names[name] = function._wrapper_name
        modules.append(llvm.parse_assembly(function._library.get_llvm_str()))
    whole = modules[0]
    for module in modules:
        _hide(module, set(names.values()))
    for module in modules[1:]:
        whole.link_in(module)
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(whole, builder)
    missing = [f.name for f in whole.functions if f.is_declaration and not f.name.startswith("llvm.")]
    if set(missing) - _LIBRARY:
        raise RuntimeError(f"the compiled loops call {sorted(set(missing) - _LIBRARY)}, which nothing provides")
    code = machine.emit_object(whole)
    header = json.dumps({"names": names, "sha256": hashlib.sha256(code).hexdigest()}).encode()
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(len(header).to_bytes(8, "little") + header + code)
    os.replace(partial, path)


def _hide(module: Any, entries: set[str]) -> None:
    """Everything but the entries is private, so that what they do not reach is left out."""
    for item in (*module.functions, *module.global_variables):
        if not item.is_declaration and item.name not in entries:
            item.linkage = "internal"


if __name__ == "__main__":
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    build(Path(sys.argv[1]))
