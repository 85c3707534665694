"""The merge methods. Importing this package registers them all; each is also a callable here, by its name.

from plait.methods import ties
ties([a, b], base=base, density=0.2)        # tensors, or state dicts
"""

from plait.methods.awd import awd
from plait.methods.block import Block
from plait.methods.contract import MergeMethod, PerModel, Range, all_methods, get_method, merge_method
from plait.methods.fitted import fisher, regmean, regmean_pp, surgery
from plait.methods.geodesic import karcher, model_stock, multislerp, nuslerp, slerp
from plait.methods.knots import knots
from plait.methods.learned import (
    adamerging,
    adamerging_pp,
    awd_adamerging,
    concrete_adamerging,
    concrete_task_arithmetic,
    self_positioning,
    tsv_adamerging,
)
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
from plait.methods.routed import e_wemoe, emr, smile, tall_mask, twin, wemoe
from plait.methods.spectral import iso_c, iso_cts, tsv_m
from plait.methods.wudi import wudi

__all__ = [
    "Block", "MergeMethod", "PerModel", "Range", "adamerging", "adamerging_pp", "all_methods", "anchor_schedule",
    "average", "awd", "awd_adamerging", "breadcrumbs", "breadcrumbs_ties", "concrete_adamerging",
    "concrete_task_arithmetic", "consensus", "dare_linear", "dare_ties", "della", "della_linear", "e_wemoe", "emr",
    "fisher", "get_method", "iso_c", "iso_cts", "karcher", "knots", "linear", "merge_method", "model_stock",
    "multislerp", "nearswap", "nuslerp", "passthrough", "regmean", "regmean_pp", "sce", "self_positioning", "slerp",
    "smile", "surgery", "tall_mask", "task_arithmetic", "ties", "tsv_adamerging", "tsv_m", "twin", "wemoe", "wudi",
]  # fmt: skip
