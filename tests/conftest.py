"""Fixtures: small real checkpoints, made once per session."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pico
import pytest
from calls import call as call
from mini_suite import mini as mini


@pytest.fixture(scope="session", autouse=True)
def _torch_alone() -> Iterator[None]:
    """Whether compiled loops lie in the user's cache must not decide what is tested: test_kernels.py has them on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLAIT_KERNELS", "0")
        yield


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tied-free Llama base and three experts, float32."""
    root = tmp_path_factory.mktemp("llama")
    base = pico.make_llama(root / "base", layers=3)
    pico.add_tokenizer(base)
    one, two, three = pico.experts(root / "experts", base, 3)
    return {"base": base, "one": one, "two": two, "three": three}


def folder_hash(folder: Path) -> str:
    """SHA-256 over the names and bytes of every file below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
