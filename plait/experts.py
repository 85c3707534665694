"""The models of a recipe, opened and aligned: for every tensor of the reference, where each model has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from plait.errors import CheckpointError
from plait.names import Alignment, align, is_tied, tie_candidates
from plait.recipe import Recipe
from plait.sources import SafetensorsSource, open_source, split_adapter_spec
from plait.sources.base import LowRank, LowRankSource, Source, TensorSpec

if TYPE_CHECKING:
    import torch

_COMPARE = 1 << 20


@dataclass(frozen=True)
class Input:
    """One model's version of one tensor. With `update`, it is the tensor `under` plus a low-rank task vector."""

    model: str
    source: Source
    stored: str
    shape: tuple[int, ...]
    dtype: str
    update: LowRank | None = None
    under: Input | None = None

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Stored elements [start, stop) of a whole tensor, flat, in storage type."""
        try:
            values = self.source.read(self.stored, start, stop)
        except OSError as error:
            raise CheckpointError(
                f"{self.source.label}: '{self.stored}' cannot be read ({error.strerror or error}); check the disk, or "
                "get the checkpoint again"
            ) from None
        if values.numel() != stop - start:
            raise CheckpointError(
                f"{self.source.label}: reading '{self.stored}' gave {values.numel()} of {stop - start} numbers; check "
                "the disk, or get the checkpoint again"
            )
        return values

    def task_vector(self, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the low-rank task vector, flat float32."""
        assert self.update is not None
        assert isinstance(self.source, LowRankSource)
        return self.source.delta(self.update.target, start, stop)

    @property
    def nbytes(self) -> int:
        """Bytes read for the whole tensor; a low-rank update counts as nothing."""
        return TensorSpec(self.stored, self.shape, self.dtype).nbytes if self.update is None else 0


@dataclass
class Model:
    """An opened model and its alignment to the reference's names."""

    name: str
    label: str
    source: Source
    alignment: Alignment = field(default_factory=Alignment)
    under: Model | None = None
    """What an adapter sits on."""
    updates: dict[str, str] = field(default_factory=dict)
    """Reference name → target name in the adapter."""
    notes: list[str] = field(default_factory=list)

    @property
    def is_adapter(self) -> bool:
        """Whether only updates are stored."""
        return self.under is not None

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json; an adapter has its base's."""
        return self.under.config if self.under is not None else self.source.config

    @property
    def labels(self) -> dict[str, str] | None:
        """id2label of a classifier's own config, if it has one."""
        found = self.source.config.get("id2label")
        return {str(key): str(value) for key, value in found.items()} if isinstance(found, Mapping) else None

    def specs(self) -> Mapping[str, TensorSpec]:
        """The whole tensors stored, by stored name."""
        return self.source.specs

    def find(self, name: str) -> Input | None:
        """This model's version of the reference tensor `name`, or None when it has none."""
        stored = self.alignment.names.get(name)
        if stored is None and self.alignment.stripped + name in self.source.specs:
            stored = self.alignment.stripped + name  # deeper than the reference: layers that only slices reach
        whole = None
        if stored is not None:
            spec = self.source.specs[stored]
            whole = Input(self.name, self.source, stored, spec.shape, spec.dtype)
        if self.under is None:
            return whole
        under = whole or self.under.find(name)  # an adapter may store a tensor whole and update it besides
        target = self.updates.get(name)
        if under is None or target is None:
            return under
        assert isinstance(self.source, LowRankSource)
        update = self.source.updates[target]
        return Input(self.name, self.source, target, update.shape, under.dtype, update, under)

    def extra(self) -> list[str]:
        """Stored names that the reference does not have (heads)."""
        return self.alignment.extra


class Library:
    """Opens each checkpoint of a recipe once."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._open: dict[str, Source] = {}
        self._stamps: dict[str, str] = {}

    def source(self, spec: str) -> Source:
        """The source of one spelling."""
        if spec not in self._open:
            source = self._open[spec] = open_source(spec, root=self.recipe.folder)
            self._stamps[spec] = source.stamp()
            if source.config.get("plait") is not None and str(source.config.get("model_type")).startswith("plait"):
                raise CheckpointError(
                    f"{spec}: is a routed model, whose experts stay apart; give its experts, or a model of one set of "
                    "weights"
                )
            quantized = source.config.get("quantization_config")
            if quantized is not None:
                kind = quantized.get("quant_method", "some method") if isinstance(quantized, Mapping) else "some method"
                raise CheckpointError(
                    f"{spec}: config.json says that it is quantised ({kind}); merge the unquantised checkpoint, and "
                    "quantise the result"
                )
        return self._open[spec]

    def model(self, spec: str, name: str, base: Model | None) -> Model:
        """Open a model; an adapter goes on the base it is spelt with, else the recipe's, else its own config's."""
        body, adapter = split_adapter_spec(spec, self.recipe.folder)
        if adapter is None:
            source = self.source(body)
            if not isinstance(source, LowRankSource):
                return Model(name, spec, source)
            return Model(name, spec, source, under=base or self._named_base(source, name))
        source = self.source(adapter)
        if not isinstance(source, LowRankSource):
            raise CheckpointError(f"{spec}: '{adapter}' is not a PEFT adapter; the part after '+' must be one")
        whole = self.source(body)
        if isinstance(whole, LowRankSource):
            raise CheckpointError(f"{spec}: '{body}' is an adapter; the part before '+' must be a whole model")
        if base is not None and whole is base.source:
            return Model(name, spec, source, under=base)
        return Model(name, spec, source, under=Model(f"{name}~base", body, whole))

    def _named_base(self, source: LowRankSource, name: str) -> Model:
        if source.base_label is None:
            raise CheckpointError(
                f"{source.label}: is an adapter; say base_model in the recipe, or spell it base+adapter"
            )
        whole = self.source(source.base_label)
        if isinstance(whole, LowRankSource):
            raise CheckpointError(f"{source.label}: its base '{source.base_label}' is itself an adapter")
        return Model(f"{name}~base", source.base_label, whole)

    def refuse_changed(self) -> None:
        """Raise CheckpointError where a file is not as it was when it was opened: what was read may be of two files."""
        for spec, source in self._open.items():
            if source.stamp() != self._stamps[spec]:
                raise CheckpointError(
                    f"{spec}: was changed while it was merged, so the result would be of no one's making; nothing was "
                    "kept: run the same command again"
                )

    def close(self) -> None:
        """Close every source."""
        for source in self._open.values():
            source.close()


def align_model(model: Model, reference: Model) -> None:
    """Fill `model.alignment` and `model.updates` against the reference's stored names."""
    names = list(reference.specs())
    if model.under is not None and model.under is not reference and not model.under.alignment.names:
        align_model(model.under, reference)
    if isinstance(model.source, LowRankSource):
        _align_adapter(model, reference, names)
        return
    model.alignment = align(names, list(model.specs()), model.label, reference.label)
    _resolve_ties(model, reference)


def _align_adapter(model: Model, reference: Model, names: list[str]) -> None:
    assert isinstance(model.source, LowRankSource)
    updates, stored = model.source.updates, [*model.source.updates, *model.specs()]
    problem: CheckpointError | None = None
    for spellings in _spellings(reference, names):
        try:
            found = align(list(spellings), stored, model.label, reference.label)
        except CheckpointError as error:
            problem = problem or error
            continue
        unmatched = [name for name in found.extra if name in updates]
        if not unmatched:
            break
        more = f" and {len(unmatched) - 1} more" if unmatched[1:] else ""
        trained_on = f" ({model.source.base_label})" if model.source.base_label else ""
        problem = CheckpointError(
            f"{model.label}: updates '{unmatched[0]}'{more}, which {reference.label} does not have; use the base that "
            f"this adapter was trained on{trained_on}"
        )
    else:
        assert problem is not None
        raise problem
    for spelling, name in found.names.items():
        (model.updates if name in updates else model.alignment.names)[spellings[spelling]] = name
    model.alignment.stripped, model.alignment.added = found.stripped, found.added
    model.alignment.extra = [name for name in found.extra if name not in updates]
    model.source.orient({target: reference.specs()[name] for name, target in model.updates.items()})


def _spellings(reference: Model, names: list[str]) -> Iterator[dict[str, str]]:
    """Spelling → name of the reference: as they are, then also as transformers has them in memory.

    Adapters carry the module names of the transformers version that trained them, files may carry older ones.
    """
    plain = {name: name for name in names}
    yield plain
    from plait.renames import in_memory_names

    renamed = in_memory_names(reference.config, names)
    if renamed:
        yield {**plain, **{memory: stored for stored, memory in renamed.items()}}


def _resolve_ties(model: Model, reference: Model) -> None:
    """A tensor that the model lacks because it is tied to one it has; one that it stores twice."""
    have = model.alignment.names
    for name in list(model.alignment.missing):
        for other in tie_candidates(name, have):
            if is_tied(reference.config) or same_bytes(reference.find(name), reference.find(other)):
                have[name] = have[other]
                model.alignment.missing.remove(name)
                model.notes.append(f"'{name}' is tied to '{other}'")
                break
    for name in list(model.alignment.extra):
        for other in tie_candidates(name, list(model.specs())):
            spec, twin = model.specs()[name], model.specs()[other]
            first, second = (Input(model.name, model.source, s.name, s.shape, s.dtype) for s in (spec, twin))
            if other not in model.alignment.extra and same_bytes(first, second):
                model.alignment.extra.remove(name)
                model.notes.append(f"'{name}' is a second copy of '{other}' and is left out")
                break


def same_bytes(first: Input | None, second: Input | None) -> bool:
    """Whether two whole stored tensors are equal, compared in pieces."""
    if first is None or second is None or first.shape != second.shape or first.dtype != second.dtype:
        return False
    numel = TensorSpec("", first.shape, first.dtype).numel
    spans = ((at, min(numel, at + _COMPARE)) for at in range(0, numel, _COMPARE))
    return all(_stored_bytes(first, *span) == _stored_bytes(second, *span) for span in spans)


def _stored_bytes(item: Input, start: int, stop: int) -> bytes:
    """Elements [start, stop) as bytes. For a safetensors file torch is not loaded, so that checking is quick."""
    if isinstance(item.source, SafetensorsSource):
        return item.source.read_bytes(item.stored, start, stop)
    from plait.lazy import torch

    return item.read(start, stop).view(torch.uint8).numpy().tobytes()
