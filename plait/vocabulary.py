"""Vocabularies of the models: are they the same, and if not, what can be done about it."""

from __future__ import annotations

from plait.experts import Model
from plait.recipe import Recipe


def match_vocabularies(recipe: Recipe, reference: Model, base: Model | None, models: list[Model]) -> list[str]:
    """Bring every model's vocabulary-sized tensors to the one that `tokenizer_source` asks for; notes about it."""
    return []


def vocabulary_hint(reference: Model, model: Model, shape: tuple[int, ...], wanted: tuple[int, ...]) -> str | None:
    """The next step when two shapes differ because two vocabularies do; None when they differ for another reason."""
    ours, theirs = reference.config.get("vocab_size"), model.config.get("vocab_size")
    if not (ours and theirs and ours != theirs and shape and wanted and shape[1:] == wanted[1:]):
        return None
    if shape[0] < theirs or wanted[0] < ours:
        return None
    return (
        f"the vocabularies differ ({theirs} tokens in {model.label}, {ours} in {reference.label}); "
        "add tokenizer_source: base (or union) to match them token by token"
    )
