"""A loaded model that answers: raw inputs of several tasks in, scores of every task's classes out, differentiable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import CheckpointError, MachineError
from plait.models.configs import AS_DATA, check_config, check_folder, check_processor
from plait.models.families import Family, Pooling, family_of
from plait.models.heads import Head
from plait.models.quiet import quiet
from plait.routing.layout import Layout, is_routed
from plait.sources.files import read_object


@dataclass(frozen=True)
class Sample:
    """One input of one task."""

    task: str
    value: Any
    """PIL image, text, or tuple of texts; for models that answer in text, the finished prompt."""


@dataclass(frozen=True)
class Batch:
    """Samples of any tasks as tensors."""

    inputs: dict[str, Tensor]
    rows: dict[str, list[int]]
    """Task → its rows in the batch."""

    def read(self, rows: Sequence[int]) -> list[int]:
        """Where the body reads what these rows are about: several answers may share one text."""
        reading = self.inputs.get("reading")
        return list(rows) if reading is None else reading[list(rows)].tolist()

    def to(self, device: torch.device) -> Batch:
        """The same batch elsewhere."""
        return Batch({name: value.to(device) for name, value in self.inputs.items()}, self.rows)


class Net:
    """A body with the heads of several tasks. Every input goes through the body once, whatever its task."""

    def __init__(self, body: nn.Module, family: Family, processor: Any, pooling: Pooling, max_length: int) -> None:
        self.body, self.family, self.processor = body, family, processor
        self.pooling: Pooling = pooling
        self.max_length = max_length
        self.heads: dict[str, Head] = {}

    @property
    def device(self) -> torch.device:
        """Where the body is."""
        return next(self.body.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The body's type."""
        return next(self.body.parameters()).dtype

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Samples → tensors on the body's device."""
        values = [sample.value for sample in samples]
        if self.family.modality == "image":
            inputs = {"pixel_values": self.processor(images=values, return_tensors="pt")["pixel_values"]}
            inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        else:
            inputs = self._tokens_of(values)
        rows: dict[str, list[int]] = {}
        for row, sample in enumerate(samples):
            rows.setdefault(sample.task, []).append(row)
        return Batch(inputs, rows).to(self.device)

    def _tokens_of(self, values: Sequence[Any]) -> dict[str, Tensor]:
        """Texts, and pairs of texts: tasks of both kinds may stand in one batch."""
        cut = {"truncation": True, "max_length": self.max_length}
        texts = [value if isinstance(value, tuple) else (value,) for value in values]
        if len({len(columns) for columns in texts}) == 1:
            columns = [list(column) for column in zip(*texts, strict=True)]
            return dict(self.processor(*columns, padding=True, return_tensors="pt", **cut))
        with quiet():
            return dict(self.processor.pad([self.processor(*one, **cut) for one in texts], return_tensors="pt"))

    def features(self, batch: Batch) -> Tensor:
        """[n, width]: what heads read."""
        assert self.family.features is not None
        self.tell(batch)
        return self.family.features(self.body, batch.inputs, self.pooling)

    def tell(self, batch: Batch) -> None:
        """Give a model that is switched by task every row's. Raises CheckpointError for one it has no expert of."""
        routing = getattr(self.body, "routing", None)
        if routing is None or routing.kind != "task":
            return
        known = routing.layout.tasks
        told = {row: task or known[0] for task, rows in batch.rows.items() for row in batch.read(rows)}
        foreign = sorted(set(told.values()) - set(known))
        if foreign:
            raise CheckpointError(
                f"this model is switched by task and has no expert of {foreign[0]} (it has {', '.join(known)}); leave "
                "the task out with --task, or measure a model that is routed by its input"
            )
        self.body.set_task([told[row] for row in range(len(told))])  # type: ignore[operator]

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        """Task → [its rows, classes]: logits of every task's own classes."""
        features = self.features(batch)
        return {task: self.heads[task](features[rows]) for task, rows in batch.rows.items()}

    def width(self) -> int:
        """Size of the features, from one forward pass of a blank input."""
        blank = _blank(self.family)
        try:
            with torch.inference_mode():
                return self.features(self.collate([Sample("", blank)])).shape[1]
        except Exception as error:  # whatever a damaged tokenizer or config leads to inside of other libraries
            raise CheckpointError(
                f"{getattr(self.body.config, 'name_or_path', '') or 'the model'}: cannot be run on any input "
                f"({_first_line(error)}); its config.json or tokenizer does not fit its weights: download them again"
            ) from None

    def add_heads(self, heads: Mapping[str, Head], classes: Mapping[str, list[str] | None]) -> None:
        """Give the net its heads, checked against the width of the features and the tasks' classes."""
        width = self.width()
        for task, head in heads.items():
            self.heads[task] = head.fit(width, classes.get(task), task).to(self.device, self.dtype)


def load_net(
    folder: Path,
    label: str,
    *,
    processor_from: Path | None = None,
    pooling: Pooling | None = None,
    max_length: int = 512,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Net:
    """Load a checkpoint folder through transformers, strictly: a tensor that is missing is an error.

    The processor (image processor or tokenizer) comes from `processor_from`, else from the folder itself.
    """
    transformers = import_transformers()
    try:
        place = torch.device(device)
    except RuntimeError:
        raise MachineError(f"--device {device}: is no device that torch knows; use cpu, cuda or cuda:1") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise MachineError(f"--device {device}: torch finds no CUDA device here; use --device cpu")
    config = read_config(folder, label)
    if is_routed(config):
        return _load_routed(folder, label, config, processor_from, pooling, max_length, dtype, device)
    family = family_of(config, label)
    chosen = pooling or family.pooling(config)
    with quiet():
        try:
            cls = getattr(transformers, family.body)
            check_folder(folder, cls, label)
            body, info = cls.from_pretrained(str(folder), dtype=dtype, output_loading_info=True, **AS_DATA)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{label}: transformers cannot load it: {_first_line(error)}") from None
        unused = () if chosen == "pooler" and family.modality == "text" else family.unused
        missing = sorted(name for name in info["missing_keys"] if not name.endswith(unused or ("\0",)))
        if missing:
            raise CheckpointError(
                f"{label}: lacks '{missing[0]}'{f' and {len(missing) - 1} more' if missing[1:] else ''}, which "
                f"{type(body).__name__} needs; the checkpoint is not whole, or is of another architecture"
            )
        processor = _processor(family, [place for place in (processor_from, folder) if place is not None], label)
    return Net(body.eval().to(device), family, processor, chosen, max_length)


def _load_routed(
    folder: Path, label: str, config: dict[str, Any], processor_from: Path | None, pooling: Pooling | None,
    max_length: int, dtype: torch.dtype, device: str,
) -> Net:  # fmt: skip
    from plait.routing.files import from_pretrained

    _, plain = Layout.of(config, label)
    family = family_of(plain, label)
    body = from_pretrained(folder, dtype=dtype, device=device)
    with quiet():
        processor = _processor(family, [place for place in (processor_from, folder) if place is not None], label)
    trunk = body.base_model if family.answers == "head" else body
    if trunk is not body:
        raise CheckpointError(
            f"{label}: is a {type(body).__name__}, whose head is one for all tasks; make it from a base that is a "
            "plain encoder, so that every task keeps its own"
        )
    return Net(body, family, processor, pooling or family.pooling(plain), max_length)


def read_config(folder: Path, label: str) -> dict[str, Any]:
    """config.json of a folder, as data."""
    try:
        found, _ = read_object(folder / "config.json", "the model configuration")
    except CheckpointError as error:
        raise CheckpointError(f"{label}: config.json cannot be read ({error}); it cannot be run") from None
    check_config(found, label)
    return found


def import_transformers() -> Any:
    """Transformers, or a sentence on how to get it."""
    try:
        import transformers
    except ImportError:
        raise MachineError('running models needs transformers: pip install "plait[eval]"') from None
    return transformers


def _processor(family: Family, places: Sequence[Path], label: str) -> Any:
    """The first processor that one of the folders holds."""
    import transformers

    for place in places:
        try:
            if family.modality == "image":
                if not (place / "preprocessor_config.json").is_file():
                    continue
                check_processor(place)
                # The pure PIL one: the other backend needs torchvision, and its pixels differ.
                return transformers.AutoImageProcessor.from_pretrained(str(place), use_fast=False, **AS_DATA)
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(place), **AS_DATA)
        except (CheckpointError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the tokenizers' Rust is no Exception
            raise CheckpointError(f"{place}: its processor cannot be loaded: {_first_line(error)}") from None
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise CheckpointError(
                f"{place}: its tokenizer has no token to pad with, nor one that ends a text; add pad_token"
            )
        return tokenizer
    raise CheckpointError(
        f"{label}: neither it nor the suite's base has a preprocessor_config.json; add it to the base's folder"
    )


def _blank(family: Family) -> Any:
    if family.modality == "text":
        return "a"
    from PIL import Image

    return Image.new("RGB", (32, 32))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
