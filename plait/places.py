"""Where Plait keeps things on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """PLAIT_CACHE, else the user's cache folder."""
    own = os.environ.get("PLAIT_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "plait"
