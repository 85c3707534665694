"""What an adapter_config.json means for the arithmetic: rank and scale of each module, and what must be refused.

Refusing is the point: an adapter variant that is read as plain LoRA merges without a word into a wrong model.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"

_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base as it is."""
_VARIANTS = {
    "use_dora": "is a DoRA adapter, whose update depends on the norm of the base weights",
    "lora_bias": "trains a bias inside of LoRA (lora_bias)",
    "trainable_token_indices": "trains single tokens of the embedding (trainable_token_indices)",
    "target_parameters": "adapts parameters instead of modules (target_parameters)",
    "layer_replication": "repeats layers of the base (layer_replication), so that it fits another model",
    "alora_invocation_tokens": "is an activated LoRA, which acts on some tokens only and cannot be merged",
    "use_qalora": "is a QA-LoRA adapter",
    "monteclora_config": "is a Monte Carlo LoRA adapter",
    "use_bdlora": "is a block-diagonal LoRA adapter",
    "arrow_config": "is an Arrow router over adapters",
    "kasa_config": "is a KaSA adapter, which changes the base weights",
    "megatron_config": "is made for Megatron's parallel layers",
}
_HARMLESS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
    "bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "velora_config", "qalora_group_size", "ensure_weight_tying", "runtime_config", "enable_lora",
    "merge_weights", "_custom_modules",
}  # fmt: skip
_MERGE_FIRST = "Merge it with peft (merge_and_unload), save the result, and give that folder instead."
_ALPHA_LIMIT = 1e6
"""Of lora_alpha: people take up to some hundreds; far larger ones make every weight overflow."""
_PATTERN_LIMIT, _NAME_LIMIT, _DOTS_LIMIT = 200, 200, 20
"""With three growing quantifiers at most, these keep the worst match under a second."""


class AdapterConfig:
    """A checked LoRA configuration."""

    def __init__(self, data: Mapping[str, Any], path: Path) -> None:
        self.path = path
        _refuse_variants(data, path)
        self.rank = _rank(data.get("r", 8), "r", path)
        self.alpha = _alpha(data.get("lora_alpha", 8), "lora_alpha", path)
        self.rank_stabilised = _flag(data, "use_rslora", path)
        self.fan_in_fan_out = _flag(data, "fan_in_fan_out", path)
        self.bias = data.get("bias", "none")
        self.whole_modules = _names(data.get("modules_to_save"), "modules_to_save", path)
        base = data.get("base_model_name_or_path")
        self.base_label = base if isinstance(base, str) and base else None
        self._ranks = [(rule, _rank(value, "rank_pattern", path)) for rule, value in _rules(data, "rank_pattern", path)]
        self._alphas = [
            (rule, _alpha(value, "alpha_pattern", path)) for rule, value in _rules(data, "alpha_pattern", path)
        ]

    def scale(self, module: str, rank: int) -> float:
        """The factor on B·A. `rank` is what the tensors say; a configuration that says otherwise is refused."""
        if (self._ranks or self._alphas) and (len(module) > _NAME_LIMIT or module.count(".") > _DOTS_LIMIT):
            raise CheckpointError(
                f"{self.path}: module name '{module[:60]}…' is too long to match patterns against it."
            )
        expected = next((value for rule, value in self._ranks if rule.match(module)), self.rank)
        if rank != expected:
            raise CheckpointError(
                f"{self.path}: says rank {expected} for module '{module}', but its tensors have rank {rank}. "
                "The configuration belongs to another adapter; download both files again."
            )
        alpha = next((value for rule, value in self._alphas if rule.match(module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def saves_whole(self, name: str) -> bool:
        """True for a tensor of a module in modules_to_save (a dotted part of the name, as in PEFT)."""
        return any(f".{module}." in f".{name}" for module in self.whole_modules)


def compile_pattern(pattern: str, key: str, path: Path) -> re.Pattern[str]:
    """PEFT's rule: the pattern is a regular expression that must match the whole module name or end it after a dot.

    Patterns come from strangers, and Python's engine takes exponential time on some of them, so only what needs little
    backtracking is allowed: no groups, references or quantifiers nested in a quantifier.
    """
    where = f"{path}: {key} pattern {pattern[:60]!r}"
    if len(pattern) > _PATTERN_LIMIT:
        raise CheckpointError(f"{where} is longer than {_PATTERN_LIMIT} characters. Write the module names instead.")
    if _may_backtrack(pattern):
        raise CheckpointError(
            f"{where} may take very long to match (nested or many quantifiers). Write the module names instead."
        )
    try:
        with warnings.catch_warnings():  # of what later versions of Python read otherwise
            warnings.simplefilter("error")
            return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError, Warning) as error:
        reason = f"is not a regular expression ({error})"
        raise CheckpointError(f"{where} {reason}. Write the module names instead.") from None


def _may_backtrack(pattern: str) -> bool:
    """True unless every quantifier repeats a single character or class, and there are at most three that can grow."""
    bare = re.sub(r"\[\^?\]?[^\]]*\]", "c", re.sub(r"\\[^1-9]", "c", pattern))
    if "\\" in bare or "(?" in bare.replace("(?:", "("):
        return True
    growing = re.findall(r"[*+]|\{\d*,?\d*\}", bare)
    return bool(re.search(r"\)\s*[*+{]", bare)) or len(growing) > 3


def _refuse_variants(data: Mapping[str, Any], path: Path) -> None:
    kind = data.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: is an adapter of type {kind!r}; Plait reads LORA. {_MERGE_FIRST}")
    for key, what in _VARIANTS.items():
        if data.get(key):
            raise CheckpointError(f"{path}: {what}; Plait reads plain LoRA and rsLoRA. {_MERGE_FIRST}")
    unknown = sorted(key for key, value in data.items() if value and key not in _HARMLESS and key not in _VARIANTS)
    if unknown:
        raise CheckpointError(
            f"{path}: sets {', '.join(map(repr, unknown[:5]))}, which Plait does not know "
            f"(peft_version: {data.get('peft_version')!r:.40}). {_MERGE_FIRST}"
        )
    start = data.get("init_lora_weights", True)
    if isinstance(start, str):
        start = {"true": True, "false": False}.get(start.lower(), start.lower())
    if not isinstance(start, (bool, str, type(None))) or start not in _PLAIN_INITS:
        raise CheckpointError(
            f"{path}: init_lora_weights is {start!r:.40}, which changed the base weights (or is not known), so this "
            "adapter may not fit the original base. Save it converted (in peft: save_pretrained with "
            "path_initial_model_for_weight_conversion=…), or merge it with peft and give the merged folder."
        )
    if data.get("bias", "none") not in ("none", "all", "lora_only"):
        raise CheckpointError(
            f"{path}: bias is {data['bias']!r:.40}; PEFT writes none, all or lora_only. Download it again."
        )


def _rules(data: Mapping[str, Any], key: str, path: Path) -> list[tuple[re.Pattern[str], Any]]:
    """A pattern table in its own order: the first match wins."""
    table = data.get(key) or {}
    if not isinstance(table, dict) or len(table) > 10_000:
        raise CheckpointError(f"{path}: {key} is not a table of module name patterns. Download the adapter again.")
    return [(compile_pattern(pattern, key, path), value) for pattern, value in table.items()]


def _rank(value: object, key: str, path: Path) -> int:
    if type(value) is not int or value <= 0:
        raise CheckpointError(
            f"{path}: {key} must be a positive integer, got {value!r:.40}. Download the adapter again."
        )
    return value


def _alpha(value: object, key: str, path: Path) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _ALPHA_LIMIT:
        return float(value)
    raise CheckpointError(
        f"{path}: {key} must be a number under {_ALPHA_LIMIT:g}, got {value!r:.40}. Download the adapter again."
    )


def _flag(data: Mapping[str, Any], key: str, path: Path) -> bool:
    value = data.get(key) or False
    if not isinstance(value, bool):
        raise CheckpointError(f"{path}: {key} must be true or false, got {value!r:.40}. Download the adapter again.")
    return value


def _names(value: object, key: str, path: Path) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise CheckpointError(f"{path}: {key} must be a list of module names. Download the adapter again.")
    return tuple(value)
