"""The merge methods. Importing this package registers them all; each is also a callable here, by its name.

from plait.methods import ties
ties([a, b], base=base, density=0.2)        # tensors, or state dicts
"""

from plait.methods.block import Block
from plait.methods.contract import MergeMethod, PerModel, Range, all_methods, get_method, merge_method
from plait.methods.geodesic import karcher, model_stock, multislerp, nuslerp, slerp
from plait.methods.others import anchor_schedule, nearswap, passthrough
from plait.methods.presets import (
    average,
    breadcrumbs,
    breadcrumbs_ties,
    consensus,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    linear,
    sce,
    task_arithmetic,
    ties,
)

__all__ = [
    "Block", "MergeMethod", "PerModel", "Range", "all_methods", "anchor_schedule", "average", "breadcrumbs",
    "breadcrumbs_ties", "consensus", "dare_linear", "dare_ties", "della", "della_linear", "get_method", "karcher",
    "linear", "merge_method", "model_stock", "multislerp", "nearswap", "nuslerp", "passthrough", "sce", "slerp",
    "task_arithmetic", "ties",
]  # fmt: skip
