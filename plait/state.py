"""What a fit has learned: a folder with state.json (facts and history) and state.safetensors (numbers).

A state is small where it can be, holds no code, and is all that a merge needs to be done again without data.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait import atomic
from plait.errors import CheckpointError, RecipeError
from plait.lazy import torch
from plait.methods.block import Block
from plait.methods.granules import granule_of
from plait.methods.stream import Stream
from plait.shards import small_file
from plait.sources.files import read_object
from plait.sources.safetensors import SafetensorsSource

SCHEMA = "plait.state/1"
FACTS, NUMBERS, TIMING = "state.json", "state.safetensors", "timing.json"


class State:
    """A learned state, read by span. Tensors: `coefficients/GRANULE` [K], `mask/TENSOR` int8 with `mask_scale/TENSOR`,
    `delta/TENSOR` (a learned task vector), `heads/TASK/NAME` (of a task's head), and whatever else a learner names.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder, self.facts = folder, facts
        self._source = SafetensorsSource(folder / NUMBERS, str(folder))

    @property
    def seconds(self) -> float | None:
        """How long its fit took, where that is known."""
        try:
            return float(json.loads((self.folder / TIMING).read_text(encoding="utf-8"))["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def names(self) -> list[str]:
        """All tensors."""
        return sorted(self._source.specs)

    def tensor(self, name: str) -> torch.Tensor | None:
        """A whole tensor, or None where there is none of that name."""
        spec = self._source.specs.get(name)
        return None if spec is None else self._source.read(name, 0, spec.numel).reshape(spec.shape).clone()

    def coefficients(self, name: str) -> list[float]:
        """λ of every expert for one tensor of the model, in the order of the tasks."""
        found, count = (
            self.tensor(f"coefficients/{group_of(name, self.option('granularity'))}"),
            len(self.facts["tasks"]),
        )
        if found is None:  # nothing of this granule could be learned: no expert changed it, or no input reaches it
            return [float(self.option("init"))] * count
        if found.shape != (count,) or not found.isfinite().all():
            raise CheckpointError(f"{self.folder}: its coefficients of '{name}' are not {count} numbers; fit again")
        return found.tolist()

    def option(self, key: str) -> Any:
        """An option of the fit. Raises CheckpointError where the state says none."""
        if key not in self.facts["fit"]:
            raise CheckpointError(f"{self.folder / FACTS}: lacks fit.{key}, which its method needs; fit again")
        return self.facts["fit"][key]

    def mask(self, block: Block) -> Stream | None:
        """The mask's logits of a block, [n]; None for a tensor without a mask."""
        name = f"mask/{block.name}"
        if name not in self._source.specs:
            return None
        return self._stream(block, name, self.mask_scale(block.name))

    def mask_scale(self, name: str) -> float:
        """What a stored mask of int8 is multiplied by."""
        scale = self.tensor(f"mask_scale/{name}")
        if scale is None or scale.numel() != 1:
            raise CheckpointError(f"{self.folder / NUMBERS}: lacks the number 'mask_scale/{name}'; fit again")
        return float(scale)

    def delta(self, block: Block) -> Stream | None:
        """The learned task vector of a block, [n]; None for a tensor without one."""
        name = f"delta/{block.name}"
        return self._stream(block, name, 1.0) if name in self._source.specs else None

    def heads(self) -> dict[str, dict[str, torch.Tensor]]:
        """Task → tensors that the merge writes into the file of its head, beside the expert's own."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name in self.names():
            if name.startswith("heads/"):
                task, _, own = name.removeprefix("heads/").rpartition("/")
                value = self.tensor(name)
                assert value is not None
                found.setdefault(task, {})[own] = value
        return found

    def labels(self, task: str) -> dict[str, str] | None:
        """Output index → class name of a head that is stored whole."""
        names = self.facts["summary"].get("labels", {}).get(task)
        return None if names is None else {str(index): name for index, name in enumerate(names)}

    def _stream(self, block: Block, name: str, scale: float) -> Stream:
        spec = self._source.specs[name]
        if spec.numel != block.grid.numel:
            raise CheckpointError(
                f"{self.folder}: '{name}' has {spec.numel} entries, but the model's tensor {block.grid.numel}; "
                "this state was learned on other models: fit again"
            )

        def load(piece: Any) -> torch.Tensor:
            device = block.base(piece).device
            return self._source.read(name, piece.start, piece.stop).to(torch.float32).mul(scale).to(device)

        return Stream(block.grid, load)

    def close(self) -> None:
        """Close its file."""
        self._source.close()


def group_of(name: str, granularity: Any) -> str:
    """Which coefficients a tensor has: those of its granule, or those of all tensors."""
    return "all" if granularity == "task" else granule_of(name, granularity)


def quantised(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 numbers and the scale that makes them logits again: a mask takes one byte an entry."""
    scale = logits.abs().max().to(torch.float32) / 127 if logits.numel() else torch.zeros(())
    if float(scale) == 0:
        return torch.zeros(logits.shape, dtype=torch.int8), torch.zeros(())
    return torch.round(logits / scale).to(torch.int8).cpu(), scale.cpu()


def load_state(folder: str | os.PathLike[str]) -> State:
    """Read a state's folder. Raises CheckpointError when it is none, or not whole."""
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; make a state with: plait fit RECIPE {path}")
    try:
        facts, _ = read_object(path / FACTS, "what a fit says of itself")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: has no {FACTS} that can be read; it is not a state ({error})") from None
    if facts.get("schema") != SCHEMA:
        raise CheckpointError(f"{path}/{FACTS}: is not of the schema {SCHEMA}; fit again with this version of Plait")
    from plait.statefacts import check_facts  # its schema takes time to make, and most merges have no state

    check_facts(facts, path / FACTS)
    return State(path, facts)


def write_state(
    folder: Path, facts: Mapping[str, Any], numbers: Mapping[str, torch.Tensor], overwrite: bool, *, scratch: Path,
    seconds: float | None = None,
) -> State:  # fmt: skip
    """Write a state: whole under its name, or not at all. The same content gives the same bytes.

    It is put together in `scratch`, on the same file system, where a state that it replaces is left. `seconds`, the
    time its fit took, goes into a file of its own. Raises RecipeError for a name that is taken, else OSError.
    """
    refuse_existing(folder, overwrite)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    content = small_file({name: numbers[name] for name in sorted(numbers)})
    whole = {"schema": SCHEMA, **facts, "numbers": hashlib.sha256(content).hexdigest()}
    text = json.dumps(whole, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    atomic.write_durably(scratch / NUMBERS, content)
    atomic.write_durably(scratch / FACTS, text.encode())
    if seconds is not None:
        atomic.write_durably(scratch / TIMING, (json.dumps({"seconds": round(seconds, 3)}) + "\n").encode())
    atomic.sync_folder(scratch)
    try:
        atomic.put_in_place(scratch, folder, replace=overwrite)
    except FileExistsError:
        raise _taken(folder) from None
    return load_state(folder)


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Raise RecipeError for a name that is taken by anything but a state that may be replaced."""
    if not folder.exists():
        return
    if not overwrite:
        raise _taken(folder)
    if not (folder / FACTS).is_file():
        raise RecipeError(f"{folder}: is not a state, so it is not replaced; choose another folder")


def _taken(folder: Path) -> RecipeError:
    return RecipeError(f"{folder}: exists already; choose another folder, or add --overwrite to replace it")


def check_fits(state: State, method: str, tasks: Sequence[str], prints: Mapping[str, str], parameters: Any) -> None:
    """Refuse a state that was learned by another method, for other experts or on other weights."""
    facts = state.facts
    if facts["method"] != method:
        raise RecipeError(f"{state.folder}: was learned for {facts['method']}, not for {method}; fit again")
    if facts["tasks"] != list(tasks):
        raise RecipeError(
            f"{state.folder}: was learned for the experts {', '.join(facts['tasks'])}, but the recipe has "
            f"{', '.join(tasks)}; fit again, or give the models the same names"
        )
    for label, fingerprint in facts["models"].items():
        if prints.get(label) != fingerprint:
            raise CheckpointError(
                f"{state.folder}: was learned on other weights of {label} than the recipe's; fit again"
            )
    if facts["vectors"] != parameters:
        raise RecipeError(
            f"{state.folder}: was learned with the parameters {json.dumps(facts['vectors'])}, but the recipe has "
            f"{json.dumps(parameters)}; fit again, or take those"
        )
