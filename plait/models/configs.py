"""config.json and preprocessor_config.json come from strangers, and transformers believes them: checked before that.

What is refused: pointers to code on a hub, and sizes that the weights do not bear out, for which transformers would
take memory before anything is seen to be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from plait.errors import CheckpointError
from plait.sources import open_source
from plait.sources.files import read_object

AS_DATA: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
"""For every `from_pretrained`: nothing is fetched, and code that a folder brings along is not run."""

_CODE = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
_COUNTS = re.compile(r"(num|n)_\w*(layers?|blocks?|experts?|stages?)|n_layer|depths?|num_labels")
_MOST_LAYERS, _MOST_LABELS, _MOST_PIXELS = 1_000, 1_000_000, 8_192
_SPARE = 10_000_000
"""Parameters that an architecture may have beyond twice those stored: poolers and the like, which a file may lack."""


def check_config(config: Mapping[str, Any], label: str) -> None:
    """Refuse what names code, and numbers of layers and labels that no model has. Raises CheckpointError."""
    for key, value in _values(config):
        if key in _CODE and isinstance(value, (str, Mapping)) and re.search("[/:@]", str(value)):
            raise CheckpointError(f"{label}: config.json: {key} names code on a hub ({value!r:.60}); remove the key")
        if type(value) is int and _COUNTS.fullmatch(key):
            most = _MOST_LABELS if key == "num_labels" else _MOST_LAYERS
            if not 0 <= value <= most:
                raise CheckpointError(f"{label}: config.json: {key} is {value:.3g}; the most is {most}. It is damaged")


def check_size(body: Any, stored: int, label: str) -> None:
    """Refuse an architecture, built on the meta device, that is much larger than what is stored for it."""
    wanted = sum(value.numel() for value in (*body.parameters(), *body.buffers()))
    if wanted > 2 * stored + _SPARE:
        raise CheckpointError(
            f"{label}: config.json describes {wanted / 1e6:.0f} M parameters, but the weights have {stored / 1e6:.1f} "
            "M; it belongs to another model, or is damaged: download both again"
        )


def check_folder(folder: Path, cls: Any, label: str) -> None:
    """`check_size` for a folder that a class of transformers is about to load."""
    import torch

    with torch.device("meta"):
        if hasattr(cls, "config_class"):
            body = cls(cls.config_class.from_pretrained(str(folder), local_files_only=True))
        else:
            import transformers

            body = cls.from_config(transformers.AutoConfig.from_pretrained(str(folder), **AS_DATA))
    source = open_source(str(folder))
    try:
        check_size(body, sum(spec.numel for spec in source.specs.values()), label)
    finally:
        source.close()


def check_processor(folder: Path) -> None:
    """Refuse images that are made absurdly large. Raises CheckpointError naming the file."""
    path = folder / "preprocessor_config.json"
    found, _ = read_object(path, "the image processor's configuration")
    for key in ("size", "crop_size", "pad_size"):
        given = found.get(key)
        for value in given.values() if isinstance(given, Mapping) else [given]:
            if isinstance(value, (int, float)) and not 0 <= value <= _MOST_PIXELS:
                raise CheckpointError(f"{path}: {key} is {value:.3g} pixels; the most is {_MOST_PIXELS}. It is damaged")


def _values(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All keys and values, those of text_config and its like too."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, Mapping):
            yield from _values(value)
        elif isinstance(value, list):
            yield from ((key, item) for item in value)
