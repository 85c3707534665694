"""`verify`: is a merged model still what `plait merge` wrote? By its recorded digests; and by merging it once more."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait import atomic, run
from plait.digests import is_sealed, marked_digest
from plait.errors import CheckpointError, MachineError
from plait.plan import make_plan
from plait.recipe import load_recipe
from plait.sources.files import read_object
from plait.sources.safetensors import open_shard
from plait.stages import Progress
from plait.state import FACTS, NUMBERS

RECORD = "plait.json"


@dataclass
class Verified:
    """What was found."""

    folder: Path
    checked: list[str] = field(default_factory=list)
    """Files whose digest was compared."""
    size: int = 0
    """Bytes of them."""
    damage: dict[str, str] = field(default_factory=dict)
    """File → what is wrong with it."""
    unrecorded: list[str] = field(default_factory=list)
    """Files that nothing was recorded of."""
    replayed: bool = False

    def refusal(self) -> str:
        """Everything that is wrong, a line each, and what to do."""
        lines = [f"{self.folder / name}: {what}" for name, what in sorted(self.damage.items())]
        cause = "the merge is not repeated to the same bytes" if self.replayed else "this model is not what was written"
        return "\n".join([*lines, f"{cause}; merge again, or copy it again from where it is whole"])


def verify(folder: Path, progress: Progress) -> Verified:
    """Compare every recorded file of a merged model, or of a state, with its digest.

    Raises CheckpointError for a folder that holds no record, or one that cannot be read.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give one that plait merge or plait fit wrote")
    found = Verified(folder)
    if not (folder / RECORD).is_file() and (folder / FACTS).is_file():
        facts, _ = read_object(folder / FACTS, "the record of the fit")
        if "numbers" not in facts:
            raise CheckpointError(f"{folder / FACTS}: records no digest; fit again to have one")
        digests, marks = {NUMBERS: facts["numbers"]}, {}
        found.checked.append(FACTS)
    else:
        record = read_record(folder)
        if not record["whole"]:
            found.damage[RECORD] = "is not what was written: its own digest does not match"
        found.checked.append(RECORD)
        digests, marks = {**record["files"], **record["outputs"]}, record["marks"]
        own = {RECORD, "README.md", *digests}
        names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
        found.unrecorded = [name for name in names if name not in own]
    sizes = {name: (folder / name).stat().st_size for name in digests if (folder / name).is_file()}
    progress.stage("verify", sum(sizes.values()))
    for name, digest in sorted(digests.items()):
        what = _fault(folder / name, digest, marks.get(name))
        if what is not None:
            found.damage[name] = what
        found.checked.append(name)
        progress.advance(sizes.get(name, 0))
    found.size = sum(sizes.values())
    return found


def read_record(folder: Path) -> dict[str, Any]:
    """plait.json of a merged model, and as `whole` whether it is as it was written. CheckpointError where it is none.

    What was written before there were digests of all files has no seal.
    """
    if not (folder / RECORD).is_file():
        raise CheckpointError(f"{folder}: holds no {RECORD}, so plait merge did not write it; merge again")
    record, _ = read_object(folder / RECORD, "the record of the merge")
    whole = is_sealed(record) or not {"seal", "files", "marks"} & record.keys()
    if not record.get("outputs"):
        raise CheckpointError(f"{folder / RECORD}: is damaged: it has no outputs; merge again")
    for key in ("outputs", "files", "marks", "recipe", "inputs"):
        if not isinstance(record.setdefault(key, {}), dict):
            raise CheckpointError(f"{folder / RECORD}: is damaged: {key} is no mapping; merge again")
    for name in (*record["outputs"], *record["files"]):
        if name.startswith("/") or ".." in Path(name).parts or not name.isprintable():
            raise CheckpointError(f"{folder / RECORD}: names {name!r}, which is not in this folder; do not trust it")
    return {**record, "whole": whole}


def _fault(path: Path, digest: object, marks: object) -> str | None:
    """What is wrong with a file; None: nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be opened ({error.strerror})"
    try:
        if marked_digest(descriptor, [])[0] == digest:
            return None
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    finally:
        os.close(descriptor)
    return f"is not what was written{_place(path, marks)}"


def _place(path: Path, marks: object) -> str:
    """In which part of a weight file the first changed byte lies."""
    if not isinstance(marks, list) or not marks:
        return ""
    descriptors: list[int] = []
    try:
        shard = open_shard(path, descriptors)
        names = list(shard.specs)
        starts = [shard.offsets[name] for name in names] or [shard.size]
        _, found = marked_digest(shard.descriptor, [*starts, shard.size] if names else starts)
    except CheckpointError:
        return ": its header cannot be read, or the file was cut"
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    if found[0] != marks[0] or len(found) != len(marks):
        return ": the first changed byte lies in its header"
    first = next(k for k, (mark, now) in enumerate(zip(marks, found, strict=True)) if mark != now)
    return f": the first changed byte lies in tensor '{names[first - 1]}'"


def replay(
    found: Verified, root: Path, *, memory: int, threads: int, device: str, progress: Progress
) -> None:  # fmt: skip
    """Merge again by the recorded recipe, in a scratch folder beside the model, and compare every digest.

    Relative paths of the recipe start at `root`. Fills `found`. Raises CheckpointError for a folder
    without a record, and for inputs that are not those that were merged; MachineError for a full disk.
    """
    folder = found.folder
    record = read_record(folder)
    plan = make_plan(load_recipe(record["recipe"], folder=root))
    try:
        for model in plan.opened():
            then = record["inputs"].get(model.label, {}).get("fingerprint")
            if then != model.source.fingerprint():
                raise CheckpointError(
                    f"{model.label}: is not what was merged (its fingerprint is not the one in {folder / RECORD}), so "
                    "the merge cannot be repeated; bring the former weights back"
                )
        state = folder / "state" if plan.method.learned is not None else None
        with _scratch(folder) as scratch:
            run.run(
                plan, scratch / "again", memory=memory, threads=threads, device=device,
                shard_size=shard_size(folder, record), overwrite=False, progress=progress, state=state,
            )  # fmt: skip
            again = read_record(scratch / "again")
    finally:
        plan.library.close()
    found.replayed = True
    for name, digest in {**record["outputs"], **record["files"]}.items():
        if {**again["outputs"], **again["files"]}.get(name) != digest:
            found.damage.setdefault(name, f"came out otherwise when it was merged again{_versions(record, again)}")


def shard_size(folder: Path, record: Mapping[str, Any]) -> int:
    """A `--shard-size` that cuts a model as it is cut: the largest file of those that hold more than one tensor."""
    sizes = [1]
    for name in record["outputs"]:
        descriptors: list[int] = []
        try:
            tensors = open_shard(folder / name, descriptors).specs.values()
            if len(tensors) > 1:
                sizes.append(sum(tensor.nbytes for tensor in tensors))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
    return max(sizes)


def _versions(record: Mapping[str, Any], again: Mapping[str, Any]) -> str:
    names = [name for name in ("plait", "torch", "python") if record.get(name) != again.get(name)]
    return "".join(f" ({name} was {record.get(name)}, is {again.get(name)})" for name in names)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A hidden folder beside the model, held locked, that is removed at the end."""
    place = folder.resolve()
    try:
        path = Path(tempfile.mkdtemp(prefix=f".{place.name}.replay-", dir=place.parent))
        guard = atomic.lock_folder(path)
    except OSError as error:
        raise MachineError(f"{place.parent}: cannot be written ({error.strerror}); --replay needs room there") from None
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if guard is not None:
            os.close(guard)
