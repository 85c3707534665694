"""The base architecture without weights: which layers there are, of which kind, and which tensor of a file is which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from plait.errors import CheckpointError, MachineError
from plait.names import align
from plait.renames import in_memory_names


def transformers_class(architecture: str, label: str) -> Any:
    """A model class of transformers by its name. Raises CheckpointError for a name that is none."""
    try:
        import transformers
    except ImportError:
        raise MachineError('routed models need transformers: pip install "plait[eval]"') from None
    found = getattr(transformers, architecture, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{label}: names the architecture '{architecture}', which the installed transformers does not have; "
            "upgrade transformers, or correct architectures in config.json"
        )
    return found


def config_of(config: Mapping[str, Any], label: str) -> Any:
    """transformers' config object."""
    import transformers

    given = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    try:
        return transformers.AutoConfig.for_model(str(config.get("model_type")), **given)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{label}: config.json: transformers cannot read it ({str(error)[:200]})") from None


def skeleton(config: Mapping[str, Any], architecture: str, label: str) -> nn.Module:
    """The architecture on the meta device."""
    cls = transformers_class(architecture, label)
    try:
        with torch.device("meta"):
            return cls(config_of(config, label))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{label}: config.json: {architecture} cannot be built ({str(error)[:200]})") from None


def memory_names(body: nn.Module, config: Mapping[str, Any], names: list[str], label: str) -> dict[str, str]:
    """Name in the file → name in memory, for what the architecture has. Raises CheckpointError where little fits."""
    renamed = in_memory_names(config, names)
    spelled = {renamed.get(name, name): name for name in names}
    have = [name for name, _ in body.named_parameters(remove_duplicate=False)]
    # Buffers that are saved; older checkpoints hold others too (position_ids), which a model makes by itself.
    have += [name for name in body.state_dict() if name not in have]
    found = align(have, list(spelled), type(body).__name__, label)
    pairs = {spelled[stored]: own for own, stored in found.names.items()}
    known = set(have)
    # What stands beside the body, such as lm_head, lacks the prefix under which the body's names were found.
    pairs |= {name: name for name in names if name not in pairs and name in known}
    return pairs
