"""Names of tensors as transformers has them in memory, where those differ from the names in the file.

Since version 5, transformers renames modules when it loads (`attention.attention.query` of a Dinov2 file is
`attention.q_proj` in memory) and renames back when it saves. Adapters keep the names of the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def in_memory_names(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Name in the file → name in memory, for a config.json's architecture; empty where transformers cannot tell.

    The architecture is built on the meta device: no weights are read or allocated, and no remote code is run. Tensors
    that are split or joined on loading have no single name in memory and are left out.
    """
    try:
        import torch
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # transformers is missing, or older than 5 and renames nothing
        return {}
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return {}
    try:
        given = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(model_type, **given))
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # an architecture that this transformers does not know
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    pairs = {name: rename_source_key(name, renamings, converters, prefix, state) for name in names}
    return {name: renamed for name, (renamed, converter) in pairs.items() if converter is None}
