"""Which tensors belong together where something is found or learned per group: one group, a layer, a module, a tensor.

Read off the name alone, so that every part of the toolkit cuts a model at the same places.
"""

from __future__ import annotations

from typing import Literal

Granularity = Literal["model", "layer", "block", "tensor"]


def granule_of(name: str, granularity: Granularity) -> str:
    """The group of a tensor.

    model:  "" for all.
    layer:  up to the first number, `encoder.layer.3`; without a number the first component, `embeddings`.
    block:  one component further, `encoder.layer.3.attention`; where a number follows that one, it too (T5's
            `encoder.block.0.layer.1`), as a list of modules is not a module.
    tensor: the name.
    """
    if granularity == "model":
        return ""
    if granularity == "tensor":
        return name
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if number is None:
        return parts[0]
    end = number + 1
    if granularity == "block":
        end += 2 if parts[end + 1 : end + 2] and parts[end + 1].isdecimal() else 1
    return ".".join(parts[:end])
