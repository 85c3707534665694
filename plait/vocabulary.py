"""Vocabularies of the models: are they the same, and if not, how `tokenizer_source` brings them to one.

A row of an embedding belongs to a token, not to a position. With `tokenizer_source` every model whose tokens or rows
are not the target's is read through `Remapped`, so that the rest of a merge sees tensors of one shape in which equal
positions are equal tokens. Models that fit already are left as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from plait.errors import CheckpointError, RecipeError, nearest
from plait.experts import Model
from plait.lazy import np
from plait.recipe import Recipe
from plait.sources import files
from plait.sources.base import Source
from plait.sources.remapped import (
    LACKING,
    Fill,
    Holder,
    Remapped,
    Rows,
    embedding_rows,
    is_vocabulary,
    vocabulary_size,
)  # fmt: skip
from plait.tokens import Tokens, extend, no_tokenizer, read_tokens, refit


@dataclass(frozen=True)
class Vocabulary:
    """What matching the vocabularies means for the files beside the weights."""

    notes: list[str] = field(default_factory=list)
    folder: Path | None = None
    """Where the tokenizer's files are taken from; None: from the donor, as everything else."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Side files that are not any model's own."""


@dataclass(frozen=True, eq=False)
class _Party:
    """A source with rows of its own: a whole model, or an adapter that replaces the embeddings."""

    name: str
    models: list[Model]
    source: Source
    tokens: Tokens
    rows: int
    tensors: Mapping[str, str]
    """Reference name → stored name of its vocabulary-sized tensors."""

    @cached_property
    def ids(self) -> dict[str, int]:
        """Its tokens that have a row."""
        return {token: place for token, place in self.tokens.ids.items() if place < self.rows}


@dataclass(frozen=True, eq=False)
class _Target:
    """The output's vocabulary. `origin` is the party whose tokenizer it is, or to which a union adds tokens."""

    origin: _Party
    ids: Mapping[str, int]
    rows: int
    folder: Path
    files: Mapping[str, bytes] = field(default_factory=dict)

    def index_of(self, party: _Party) -> np.ndarray:
        """Row of the target → row of the party, or LACKING."""
        index = np.full(self.rows, LACKING, dtype=np.int64)
        used = np.zeros(self.rows, dtype=bool)
        for token, place in self.ids.items():
            if place < self.rows:
                used[place] = True
                if (own := party.ids.get(token)) is not None:
                    index[place] = own
        if party is self.origin or party.tokens.ids == self.origin.tokens.ids:  # then padding means the same in both
            padding = np.flatnonzero(~used)
            padding = padding[padding < party.rows]
            index[padding] = padding
        return index

    def fit(self, config: Mapping[str, Any], party: _Party) -> dict[str, Any]:
        """A configuration of the party with the target's number of rows and its ids of the tokens that it names."""
        return refit(config, party.tokens.ids, self.ids, vocabulary_size(config), self.rows)


def match_vocabularies(recipe: Recipe, reference: Model, base: Model | None, models: list[Model]) -> Vocabulary:
    """Bring every model's vocabulary-sized tensors to the target of `tokenizer_source`, by replacing its source.

    Raises RecipeError when the target is no model of the recipe, CheckpointError for tokenizers that cannot be read and
    for adapters that hold embeddings of another vocabulary.
    """
    if recipe.tokenizer_source is None:
        return Vocabulary()
    main = reference.under or reference
    everyone = [each for model in [main, *([base] if base else []), *models] for each in (model, model.under) if each]
    wholes = _wholes(everyone)
    first = wholes[id(main.source)]
    known = list(first.tensors)
    adapters = {model.name: model for model in models if model.under is not None}
    replacing = {
        name: party for name, model in adapters.items() if (party := _replacing(model, wholes, known)) is not None
    }
    parties = sorted([*wholes.values(), *replacing.values()], key=lambda party: party.name)
    target = _target(recipe, first, base, models, wholes, replacing, parties)
    indices = {party.name: target.index_of(party) for party in parties}
    changed = {party.name for party in parties if not _is_identity(indices[party.name], party.rows)}
    _check_adapters(adapters, wholes, replacing, changed, known, target)
    base_party = wholes[id(base.source)] if base is not None else None
    notes = _notes(target, parties, changed, indices, base_party)
    made = dict(target.files)
    if first.name in changed and (path := first.source.folder / "generation_config.json").exists():
        before = files.read_object(path, "the generation configuration")[0]
        made[path.name] = json.dumps(target.fit(before, first), indent=2, ensure_ascii=False).encode() + b"\n"
    for party in wholes.values():
        if party.name in changed:
            source = _remapped(party, target, parties, indices, base_party)
            for model in party.models:
                model.source = source
    return Vocabulary(notes, target.folder, made)


def vocabulary_hint(reference: Model, model: Model, shape: tuple[int, ...], wanted: tuple[int, ...]) -> str | None:
    """The next step when two shapes differ because two vocabularies do; None when they differ for another reason."""
    if not shape or not wanted or shape[1:] != wanted[1:]:
        return None
    ours = vocabulary_size(reference.config)
    theirs = shape[0] if model.is_adapter else vocabulary_size(model.config)  # an adapter's config is its base's
    if not (ours and theirs and ours != theirs) or shape[0] < theirs or wanted[0] < ours:
        return None
    return (
        f"the vocabularies differ ({theirs} tokens in {model.label}, {ours} in {reference.label}); "
        "add tokenizer_source: base (or union) to match them token by token"
    )


def _wholes(everyone: Iterable[Model]) -> dict[int, _Party]:
    """Each whole-model source once, by identity: models that share a source must go on sharing it."""
    groups: dict[int, list[Model]] = {}
    for model in everyone:
        group = groups.setdefault(id(model.source), [])
        if not model.is_adapter and all(other is not model for other in group):
            group.append(model)
    result: dict[int, _Party] = {}
    for key, group in groups.items():
        if group:
            source = group[0].source
            tokens = read_tokens(source.folder)
            if tokens is None:
                raise no_tokenizer(source.folder, group[0].label)
            rows = embedding_rows(source)
            sized = {name for name, spec in source.specs.items() if is_vocabulary(spec, rows)}
            tensors: dict[str, str] = {}
            for model in group:
                tensors.update({ours: own for ours, own in model.alignment.names.items() if own in sized})
            name = min(model.name for model in group)
            result[key] = _Party(name, group, source, tokens, rows, tensors)
    return result


def _under(model: Model, wholes: Mapping[int, _Party]) -> _Party:
    assert model.under is not None
    return wholes[id(model.under.source)]


def _replacing(model: Model, wholes: Mapping[int, _Party], known: list[str]) -> _Party | None:
    """An adapter with whole embeddings beside its updates (a resized vocabulary); None for all other adapters."""
    names = {name: model.alignment.names[name] for name in known if name in model.alignment.names}
    rows = {model.specs()[stored].shape[0] for stored in names.values()}
    if not rows:
        return None
    if len(rows) > 1:
        raise CheckpointError(
            f"{model.label}: replaces embeddings with {sorted(rows)} rows, so which are its tokens' cannot be told. "
            "Merge it into its base with peft (merge_and_unload) and give the merged folder."
        )
    tokens = read_tokens(model.source.folder) or _under(model, wholes).tokens
    return _Party(model.name, [model], model.source, tokens, rows.pop(), names)


def _target(
    recipe: Recipe, first: _Party, base: Model | None, models: list[Model], wholes: Mapping[int, _Party],
    replacing: Mapping[str, _Party], parties: list[_Party],
) -> _Target:  # fmt: skip
    asked, where = recipe.tokenizer_source, recipe.where("tokenizer_source")
    if asked == "union":
        return _union(first, parties)
    if asked == "base" or asked == recipe.base_model:
        if base is None:
            raise RecipeError(f"{where}: base needs a base_model; name one, or write union or a model")
        return _as_is(first, first.source.folder)
    chosen = [m for m in models if m.label == asked] or [m for m in models if m.name == asked]
    if not chosen:
        names = ["base", "union", *(model.name for model in models), *(model.label for model in models)]
        raise RecipeError(f"{where}: '{asked}' is no model of this recipe{nearest(asked or '', names)}")
    model = chosen[0]
    if model.under is None:
        return _as_is(wholes[id(model.source)], model.source.folder)
    own = read_tokens(model.source.folder)
    party = replacing.get(model.name) or _under(model, wholes)
    if own is not None and own.ids != party.tokens.ids:
        raise CheckpointError(
            f"{own.path}: differs from the tokenizer of {party.source.label}, whose embeddings {model.label} uses, so "
            "that its tokens have no rows. Write tokenizer_source: base, or name the model that it was trained on."
        )
    return _as_is(party, party.tokens.path.parent if own is None else model.source.folder)


def _as_is(party: _Party, folder: Path) -> _Target:
    return _Target(party, party.tokens.ids, party.rows, folder)


def _union(first: _Party, parties: list[_Party]) -> _Target:
    """The first party's tokens, then what others have rows for: by name of model, then by id."""
    new: dict[str, Mapping[str, bool] | None] = {}
    for party in parties:
        for token in sorted(party.ids, key=lambda token: (party.ids[token], token)):
            if token not in first.tokens.ids:
                new.setdefault(token, party.tokens.added.get(token))
    folder = first.source.folder
    ids: Mapping[str, int] = first.tokens.ids
    made: dict[str, bytes] = {}
    if new:
        made["tokenizer.json"], ids = extend(first.tokens, new.items())
    last = max((ids[token] for party in parties for token in party.ids if token in ids), default=-1)
    return _Target(first, ids, max(first.rows, last + 1), folder, made)


def _is_identity(index: np.ndarray, rows: int) -> bool:
    return len(index) == rows and bool((index == np.arange(rows)).all())


def _check_adapters(
    adapters: Mapping[str, Model], wholes: Mapping[int, _Party], replacing: Mapping[str, _Party], changed: set[str],
    known: list[str], target: _Target,
) -> None:  # fmt: skip
    """What an adapter holds of the embeddings is merged as it is, so it must be of the target's vocabulary already."""
    advice = "merge it into its base with peft (merge_and_unload), or write its name as tokenizer_source"
    theirs = f"vocabulary is not the target's ({target.rows} rows, from {target.folder}); {advice}"
    for name, model in sorted(adapters.items()):
        under = _under(model, wholes)
        if name in replacing and name in changed:
            raise CheckpointError(
                f"{model.label}: replaces the embeddings with {replacing[name].rows} rows of its own, and its {theirs}"
            )
        updated = [each for each in known if each in model.updates and each not in model.alignment.names]
        if updated and under.name in changed:
            raise CheckpointError(f"{model.label}: updates '{updated[0]}' of {under.source.label}, whose {theirs}")


def _remapped(
    party: _Party, target: _Target, parties: list[_Party], indices: Mapping[str, np.ndarray], base: _Party | None
) -> Remapped:
    def holder(owner: _Party, name: str) -> Holder:
        return Holder(owner.source, owner.tensors[name], indices[owner.name])

    rows: dict[str, Rows] = {}
    for name, spec in party.source.specs.items():
        if is_vocabulary(spec, party.rows):
            ours = next((ours for ours, stored in party.tensors.items() if stored == name), None)
            others = [holder(p, ours) for p in parties if ours in p.tensors] if ours is not None else []
            of_base = holder(base, ours) if base is not None and ours is not None and ours in base.tensors else None
            rows[name] = Rows(Holder(party.source, name, indices[party.name]), Fill(of_base, others))
    config = target.fit(party.source.config, party)
    return Remapped(party.source, rows, config, {party.tokens.path.name: party.tokens.sha256})


def _notes(
    target: _Target, parties: list[_Party], changed: set[str], indices: Mapping[str, np.ndarray], base: _Party | None
) -> list[str]:  # fmt: skip
    def who(party: _Party) -> str:
        return "the base" if party is base else party.name

    notes = []
    if target.files:
        added = len(set(target.ids) - set(target.origin.tokens.ids))
        notes.append(f"tokenizer: {added} tokens added to that of {who(target.origin)}")
    for party in parties:
        if party.name in changed:
            lacking = int((indices[party.name] == LACKING).sum())
            note = f"{who(party)}: its {party.rows} vocabulary rows are matched to {target.rows} by token"
            left = [token for token in party.ids if token not in target.ids]
            note += f"; {lacking} of these it lacks" if lacking else ""
            note += f"; {len(left)} of its tokens are left out ('{left[0]}'{', …' if left[1:] else ''})" if left else ""
            notes.append(note)
    if base is not None and (count := int((indices[base.name] == LACKING).sum())):
        notes.append(f"{count} vocabulary rows that the base lacks are the mean over the models that have them")
    if count := int(np.all([index == LACKING for index in indices.values()], axis=0).sum()):
        notes.append(f"{count} vocabulary rows are in no model and are zero")
    return notes
