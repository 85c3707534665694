"""Names of tensors as transformers has them in memory, where those differ from the names in the file.

Since version 5, transformers renames modules when it loads (`attention.attention.query` of a Dinov2 file is
`attention.q_proj` in memory) and renames back when it saves. Adapters keep the names of the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def in_memory_names(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Name in the file → name in memory, for a config.json's architecture; empty where transformers cannot tell.

    The architecture is built on the meta device: no weights are read or allocated, and no remote code is run.
    """
    try:
        import torch
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return {}
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return {}
    try:
        given = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(model_type, **given))
        renamings = [step for step in get_model_conversion_mapping(model) if hasattr(step, "rename_source_key")]
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    result = {}
    for name in names:
        renamed = name
        for step in renamings:
            renamed = step.rename_source_key(renamed)[0]
        result[name] = renamed
    return result
