"""The compiled loops, for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from plait.kernels import native


@pytest.fixture(scope="module", autouse=True)
def loops(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The loops, compiled once for a checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(native.OFF, raising=False)
        patch.setenv("PLAIT_CACHE", str(request.config.cache.mkdir("plait")))
        patch.setattr(native, "WORTH", 0)
        native._path.cache_clear()
        native._loaded.cache_clear()
        compiled = native.loops()
        if compiled is None:
            pytest.skip("numba is not installed, so there is nothing to compare")
        yield compiled
    native._path.cache_clear()
    native._loaded.cache_clear()
