"""What happens to each tensor of the output, and why: merged, copied, kept per task, or a problem to be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from plait.dtypes import FLOATS, from_recipe, widest
from plait.errors import RecipeError
from plait.experts import Input, Library, Model, same_bytes
from plait.layers import Layers
from plait.layout import Entry, entries_of
from plait.methods.contract import MergeMethod
from plait.methods.stream import Grid, Scope
from plait.names import is_tied, tie_candidates
from plait.recipe import Recipe
from plait.settings import Resolver
from plait.sources.base import TensorSpec
from plait.vocabulary import vocabulary_hint

Action = Literal["merge", "copy"]
_HEADS = ("classifier", "score", "qa_outputs")
"""What transformers calls the modules that turn features into a task's answers."""
_COUNTERS = "num_batches_tracked"
"""BatchNorm's step counter: differs between experts by nature, and nothing at inference reads it."""


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the merged model."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    action: Action
    reason: str
    inputs: tuple[Input, ...]
    """Merged: one per expert in canonical order. Copied: what is copied, then what must agree with it."""
    base: Input | None = None
    keywords: Mapping[str, Any] = field(default_factory=dict)
    depth: float = 0.0
    scope: Scope = "element"
    key: str = ""
    """Name that keys random numbers and surveys: a tied tensor has its twin's."""

    @property
    def spec(self) -> TensorSpec:
        """Name, shape and type as written."""
        return TensorSpec(self.name, self.shape, self.dtype)

    @property
    def grid(self) -> Grid:
        """How the tensor is cut."""
        return Grid.of(self.shape, self.scope)

    @property
    def bytes_in(self) -> int:
        """Bytes read once over all inputs and the base."""
        return sum(item.nbytes for item in self.inputs) + (self.base.nbytes if self.base else 0)

    def working_bytes(self) -> int:
        """Memory of the job: the buffers of one piece, which a method holds about four times per expert.

        Methods that see a whole matrix work on it in float64, beside its task vectors: up to six times, measured.
        """
        if self.action == "copy":
            return 1 << 22
        wide = 8 if "F64" in {item.dtype for item in self.inputs} else 4
        count = len(self.inputs)
        buffers = 6 * count + 28 if self.scope == "tensor" else 4 * count + 6
        return min(self.grid.unit, max(self.grid.numel, 1)) * wide * buffers


@dataclass(frozen=True)
class Refusal:
    """A tensor that cannot be merged, and why: the sentence names the file and the next step."""

    name: str
    why: str


class Planner:
    """One pass over the output's tensors."""

    def __init__(
        self, recipe: Recipe, method: MergeMethod, resolver: Resolver, reference: Model, base: Model | None,
        experts: list[list[Model]],
    ) -> None:  # fmt: skip
        self.recipe, self.method, self.resolver = recipe, method, resolver
        self.reference, self.base, self.experts = reference, base, experts
        self.layers = Layers(reference.specs())
        self.entries, self.picked = entries_of(recipe, reference, self.layers, base)
        self.notes: list[str] = []
        self.merged_names: list[str] = []
        self.refused: list[Refusal] = []
        self._matched: set[str] = set()
        self._tied = is_tied(reference.config)
        self._per_task: set[str] = set()
        labels = [model.labels for group in experts for model in group]
        self._labels_differ = any(found != labels[0] for found in labels)

    def run(self) -> list[TensorPlan]:
        """Decide about every tensor; what cannot be merged goes into `refused`, what is worth knowing into `notes`."""
        planned = [plan for plan in (self._tensor(entry) for entry in self.entries) if plan is not None]
        self._check_keep()
        if self.recipe.slices is None:
            self._check_depth()
        densities = [p.keywords["density"] for p in planned if "density" in p.keywords]
        if densities and all(d >= 1 for given in densities for d in given):
            self.notes.append(f"density is 1 everywhere, so {self.method.name} drops nothing; papers use 0.1 to 0.9")
        copied = [p for p in planned if p.action == "copy" and p.reason.startswith("no expert")]
        if copied:
            names = ", ".join(p.name for p in copied[:3]) + (", …" if len(copied) > 3 else "")
            self.notes.append(f"{len(copied)} tensor(s) are the base's, because no expert has them: {names}")
        return planned

    def heads(self, models: list[Model], library: Library) -> dict[str, list[Input]]:
        """Per task: what only the expert has, and what `keep: per_task` sets apart."""
        result: dict[str, list[Input]] = {}
        for model in models:
            if self.base is not None and model.source is self.base.source:
                continue
            own = []
            if model.source.extra_heads is not None:
                file = library.source(str(model.source.extra_heads))
                own += [Input(model.name, file, s.name, s.shape, s.dtype) for s in file.specs.values()]
            for stored in model.extra():
                spec = model.specs()[stored]
                own.append(Input(model.name, model.source, stored, spec.shape, spec.dtype))
            for name in sorted(self._per_task):
                found = model.find(name)
                if found is not None and found.source is model.source:
                    own.append(found)
            if own:
                result[model.name] = own
        return result

    def _tensor(self, entry: Entry) -> TensorPlan | None:
        base = self.base.find(entry.of(self.base.name)) if self.base is not None else None
        experts = self.experts[entry.slice_index]
        found = {model.name: model.find(entry.of(model.name)) for model in experts}
        keeper = self._keeper(entry, [item for item in found.values() if item is not None])
        if keeper is not None:
            return self._copy(entry, base, keeper) if base is not None else None
        present = {name: item for name, item in found.items() if item is not None}
        if not present:
            if base is None:
                self._nowhere(entry, experts)
                return None
            return self._copy(entry, base, "no expert has it")
        first = base or next(iter(present.values()))
        if first.dtype not in FLOATS:
            return self._non_float(entry, first, present)
        missing = [model for model in experts if found[model.name] is None]
        if missing:
            self._missing(entry, missing, present)
            return None
        for model in experts:
            item = found[model.name]
            assert item is not None
            if item.shape != first.shape:
                self._mismatch(entry, model, item, first)
                return None
            if item.dtype not in FLOATS:
                self._refuse(
                    entry,
                    f"{model.label}: '{item.stored}' is {item.dtype}, but {first.dtype} in {first.source.label}; only "
                    f"floating tensors are merged: keep: {{base: [{entry.name}]}} takes the base's",
                )
                return None
        if (
            base is not None
            and self.method.base != "unused"
            and all(item.stored == base.stored and item.source is base.source for item in present.values())
        ):
            return self._copy(entry, base, "no adapter changes it")
        return self._merge(entry, base if self.method.base != "unused" else None, first, list(present.values()))

    def _merge(self, entry: Entry, base: Input | None, first: Input, inputs: list[Input]) -> TensorPlan:
        key, t, depth = self._key(entry.name), entry.t, entry.depth
        tasks = [item.model for item in inputs]
        inputs_named = {model: entry.of(model) for model in tasks}
        if key != entry.name:  # a second copy: all that decides about the first decides about it
            depth, inputs_named = self.layers.depth(key), dict.fromkeys(tasks, key)
        slice_index = entry.slice_index if self.recipe.slices is not None else None
        keywords = self.resolver.keywords(key, t, tasks, inputs_named, slice_index)
        self.merged_names += [key, *inputs_named.values()]
        return TensorPlan(
            name=entry.name,
            shape=first.shape,
            dtype=self._dtype(first if self.base is not None else None, inputs),
            action="merge",
            reason=f"{len(inputs)} models",
            inputs=tuple(inputs),
            base=base,
            keywords=keywords,
            depth=depth,
            scope=self.method.scope_for(keywords, key, first.shape),
            key=key,
        )

    def _key(self, name: str) -> str:
        """Tied tensors that a file stores twice must come out the same twice: all go by one name.

        Older config.json do not say that a model ties, and T5's `tie_word_embeddings: false` is about the head only:
        equal bytes in the reference count too.
        """
        while not (name == "shared.weight" or name.endswith(".shared.weight")):
            first = self.reference.find(name)
            for other in tie_candidates(name, self.reference.specs()):
                second = self.reference.find(other)
                assert second is not None
                if first is not None and first.shape == second.shape and (self._tied or same_bytes(first, second)):
                    name = other
                    break
            else:
                break
        return name

    def _dtype(self, base: Input | None, inputs: list[Input]) -> str:
        asked = self.recipe.out_dtype or self.recipe.dtype
        if asked is None or asked == "base":
            return base.dtype if base is not None else widest([item.dtype for item in inputs])
        return from_recipe(asked, "out_dtype")

    def _copy(self, entry: Entry, source: Input, reason: str, agree: tuple[Input, ...] = ()) -> TensorPlan:
        dtype = self._dtype(source, [source]) if source.dtype in FLOATS else source.dtype
        return TensorPlan(entry.name, source.shape, dtype, "copy", reason, (source, *agree), key=entry.name)

    def _non_float(self, entry: Entry, first: Input, present: Mapping[str, Input]) -> TensorPlan | None:
        for name, item in present.items():
            if item.shape != first.shape or item.dtype != first.dtype:
                self._refuse(
                    entry,
                    f"{name}: '{entry.name}' is {item.dtype}{list(item.shape)}, but "
                    f"{first.dtype}{list(first.shape)} in {first.source.label}; tensors that are not floating are "
                    f"copied and must agree: keep: {{base: [{entry.name}]}} takes the base's",
                )
                return None
        if entry.name.endswith(_COUNTERS):
            return self._copy(entry, first, "counter, not merged")
        others = tuple(item for item in present.values() if item != first)
        return self._copy(entry, first, f"{first.dtype} is not merged", others)

    def _keeper(self, entry: Entry, present: list[Input]) -> str | None:
        """Why the tensor is not merged: the recipe keeps it, or it is a classifier of tasks with other labels."""
        for pattern in self.recipe.keep.per_task:
            if pattern in entry.name:
                self._matched.add(pattern)
                self._per_task.add(entry.name)
                return "kept per task; the base's here"
        for pattern in self.recipe.keep.base:
            if pattern in entry.name:
                self._matched.add(pattern)
                if self.base is None:
                    raise RecipeError(f"{self.recipe.where('keep', 'base')}: needs base_model")
                return "kept from the base"
        if len(present) > 1 and entry.name.split(".")[0] in _HEADS:
            if self._labels_differ:
                self._per_task.add(entry.name)
                return "head of tasks with other labels, kept per task; the base's here"
            head = entry.name.split(".")[0]
            note = f"'{head}' is merged, as the head of one task; keep: {{per_task: [{head}]}} leaves it to each"
            if note not in self.notes:
                self.notes.append(note)
        return None

    def _check_keep(self) -> None:
        extras = [name for group in self.experts for model in group for name in model.extra()]
        for key in ("base", "per_task"):
            for i, pattern in enumerate(getattr(self.recipe.keep, key)):
                if pattern not in self._matched and not any(pattern in name for name in extras):
                    where = self.recipe.where("keep", key, i)
                    raise RecipeError(f"{where}: '{pattern}' is part of no tensor's name")

    def _check_depth(self) -> None:
        """More layers than the reference has are not a head: the models do not belong together."""
        for model in self.experts[0]:
            for stored in model.extra():
                name = stored.removeprefix(model.alignment.stripped)
                for stack, count in self.layers.counts.items():
                    index = name.removeprefix(stack).split(".")[0]
                    if name.startswith(stack) and index.isdigit() and int(index) >= count:
                        why = (
                            f"{model.label}: has a layer {index} ('{stored}'), but {self.reference.label} has {count} "
                            "layers; merge parts of them with slices and layer_range"
                        )
                        self.refused.append(Refusal(name, why))

    def _missing(self, entry: Entry, missing: list[Model], present: Mapping[str, Input]) -> None:
        layer = self.layers.place(entry.of(missing[0].name))
        if self.recipe.slices is not None and layer is None and any(c.isdigit() for c in entry.of(missing[0].name)):
            self._refuse(entry, f"{missing[0].label}: has no '{entry.of(missing[0].name)}'; check layer_range")
            return
        self._refuse(
            entry,
            f"{missing[0].label}: tensor '{entry.name}' is missing, though {', '.join(sorted(present)[:3])} "
            f"{'have' if len(present) > 1 else 'has'} it; add keep: {{base: [{entry.name}]}} to take the base's, "
            "or fix the checkpoint",
        )

    def _refuse(self, entry: Entry, why: str) -> None:
        self.refused.append(Refusal(entry.name, why))

    def _nowhere(self, entry: Entry, experts: list[Model]) -> None:
        wanted = entry.of(experts[0].name)
        if self.recipe.slices is None:
            self._refuse(entry, f"{self.reference.label}: tensor '{wanted}' is in no listed model")
            return
        count = max(self.layers.counts.values())
        self._refuse(entry, f"{experts[0].label}: has no '{wanted}' (of {count} layers); check layer_range")

    def _mismatch(self, entry: Entry, model: Model, item: Input, first: Input) -> None:
        against = (
            f"{model.label}: '{item.stored}' is {list(item.shape)}, but {list(first.shape)} in {first.source.label}"
        )
        hint = vocabulary_hint(self.reference, model, item.shape, first.shape)
        self._refuse(
            entry, f"{against}; {hint or f'is it a head? keep: {{per_task: [{entry.name}]}} leaves it to each task'}"
        )
