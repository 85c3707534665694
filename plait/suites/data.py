"""One split of a task as inputs and labels: image folders, CSV, JSON lines, Parquet, or a `datasets` id.

Reading is the `datasets` library's; here is what every split must be: inputs of one kind, labels where they are needed,
and a digest of every sample, by which splits are compared and results are filed.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from plait.errors import CheckpointError, MachineError, RecipeError, nearest
from plait.sources.files import check_depth, read_whole
from plait.suites.definition import DataEntry, Suite

_READERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json"}
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_INPUTS = ("image", "img", "text", "sentence", "sms", "content", "file_name")
_LABELS = ("label", "labels", "fine_label", "class")
_MOST_PIXELS, _MOST_BYTES = 1 << 26, 256 << 20
"""Of one image: 200 MB once it is decoded."""
_NO_ROWS = "{where}: holds no rows; give a file with at least one"


class Split:
    """Inputs and labels of one split, read lazily. An input is a PIL image, a text, or a tuple of texts."""

    def __init__(self, table: Any, entry: DataEntry, classes: Sequence[str] | None) -> None:
        self.where = entry.where
        self._table = table
        self._columns = _input_columns(table, entry)
        self.label_column = entry.label if entry.label in table.column_names else _other_label(table, entry)
        self._declared = list(classes) if classes is not None else None
        self.is_image = type(table.features[self._columns[0]]).__name__ == "Image"
        if self.is_image:
            import datasets

            # Undecoded: one broken image must name its row and not end the whole read.
            self._table = table.cast_column(self._columns[0], datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> Any:
        """The input in one row."""
        record = self._table[row]
        if self.is_image:
            return self._image(record[self._columns[0]], row)
        texts = tuple(self._text(record[column], row, column) for column in self._columns)
        return texts[0] if len(texts) == 1 else texts

    def columns(self, row: int) -> dict[str, str]:
        """The text columns of one row, for prompts."""
        record = self._table[row]
        return {column: self._text(record[column], row, column) for column in self._columns}

    @cached_property
    def classes(self) -> list[str] | None:
        """Class names in the order of the labels; None for numbers without names and for free text."""
        if self._declared is not None:
            return self._declared
        if self.label_column is None:
            return None
        names = getattr(self._table.features[self.label_column], "names", None)
        if names is not None:
            return list(names)
        values = self._table[self.label_column]
        return sorted(set(values)) if all(isinstance(value, str) for value in values) else None

    def labels(self, *, as_text: bool = False) -> list[Any]:
        """Every sample's label: class index, number, or (`as_text`) the answer as text."""
        if self.label_column is None:
            raise RecipeError(
                f"{self.where}: labels missing: its columns are {', '.join(self._table.column_names)}; "
                "say which one with label:"
            )
        values = list(self._table[self.label_column])
        for row, value in enumerate(values):
            if value is None or value != value or (isinstance(value, int) and value < 0):
                raise CheckpointError(f"{self.where}: row {row} has no label; a test split needs one in every row")
        names = self.classes
        if as_text:
            return [names[value] if isinstance(value, int) and names else str(value) for value in values]
        if names is None or not any(isinstance(value, str) for value in values):
            self._check_range(values, names)
            return values
        place = {name: index for index, name in enumerate(names)}
        for row, value in enumerate(values):
            if value not in place:
                raise CheckpointError(
                    f"{self.where}: row {row} has the label '{value}', which is not in classes"
                    f"{nearest(str(value), names)}"
                )
        return [place[value] for value in values]

    def _check_range(self, values: list[Any], names: list[str] | None) -> None:
        for row, value in enumerate(values):
            if names is not None and value not in range(len(names)):
                raise CheckpointError(
                    f"{self.where}: row {row} has label {value}, but there are {len(names)} classes, counted from 0; "
                    "correct the row, or classes: of the suite"
                )

    @cached_property
    def digests(self) -> list[bytes]:
        """One SHA-256 per input: of an image file's bytes, of a text without case and spacing."""
        found = []
        for row, record in enumerate(self._table):
            if self.is_image:
                found.append(hashlib.sha256(self._bytes(record[self._columns[0]], row)).digest())
            else:
                texts = [self._text(record[column], row, column) for column in self._columns]
                found.append(hashlib.sha256("\0".join(" ".join(t.casefold().split()) for t in texts).encode()).digest())
        return found

    def fingerprint(self) -> str:
        """SHA-256 over all inputs and labels, in order; unlike `digests`, case and spacing of a text count."""
        digest = hashlib.sha256(b"".join(self.digests))
        if not self.is_image:
            digest.update(repr([self[row] for row in range(len(self))]).encode())
        digest.update(repr(self.labels() if self.label_column is not None else None).encode())
        digest.update(repr(self.classes).encode())
        return digest.hexdigest()

    def _image(self, value: Any, row: int) -> Any:
        from PIL import Image

        content = self._bytes(value, row)
        try:
            with Image.open(io.BytesIO(content)) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise CheckpointError(
                        f"{self.where}: row {row}: the image has {image.width} × {image.height} pixels, more than "
                        f"{_MOST_PIXELS / 1e6:.0f} million; remove it, or make it smaller"
                    )
                return image.convert("RGB")
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{self.where}: row {row}: the image cannot be decoded ({type(error).__name__}); remove or replace it"
            ) from None

    def _bytes(self, value: Any, row: int) -> bytes:
        if value is None or (value.get("bytes") is None and value.get("path") is None):
            raise CheckpointError(f"{self.where}: row {row} has no image; remove the row")
        if value.get("bytes") is not None:
            return value["bytes"]
        try:
            return read_whole(Path(value["path"]), _MOST_BYTES)
        except CheckpointError as error:
            raise CheckpointError(f"{self.where}: row {row}: {error}") from None

    def _text(self, value: Any, row: int, column: str) -> str:
        if not isinstance(value, str):
            raise CheckpointError(f"{self.where}: row {row}: '{column}' is {value!r}, not a text; remove the row")
        return value


def load_split(suite: Suite, task: str, split: str) -> Split:
    """Read a task's split. Raises RecipeError when the suite has none, CheckpointError for a file that is damaged."""
    entry = suite.tasks[task].data.get(split)
    if entry is None:
        raise RecipeError(f"{suite.where('tasks', task, 'data')}: has no {split} split; add {split}: there")
    return Split(_read(suite, entry), entry, suite.tasks[task].classes)


def check_disjoint(task: str, splits: Mapping[str, Split]) -> None:
    """Refuse splits that share inputs with the test split: what is reported must not have been seen."""
    test = {digest: row for row, digest in reversed(list(enumerate(splits["test"].digests)))}
    for name, split in splits.items():
        shared = [(row, test[digest]) for row, digest in enumerate(split.digests) if digest in test]
        if name != "test" and shared:
            row, other = shared[0]
            raise CheckpointError(
                f"{split.where}: {len(shared)} of its {len(split)} inputs are also in {task}'s test split (row {row} "
                f"is row {other} of {splits['test'].where}); {name} and test must be disjoint: remove them from {name}"
            )


def _read(suite: Suite, entry: DataEntry) -> Any:
    try:
        import datasets
    except ImportError:
        raise MachineError('reading data sets needs the datasets library: pip install "plait[eval]"') from None
    from plait.suites.places import cache_folder

    datasets.utils.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what cannot be read we say ourselves
    # Else it tells a server of every file, local ones too.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # pyright: ignore[reportAttributeAccessIssue]
    cache = str(cache_folder() / "datasets")
    options: dict[str, Any] = {"cache_dir": cache, "split": entry.split or "train"}
    try:
        if entry.path is None:
            assert entry.dataset is not None
            local = suite.place(entry.dataset)
            return _not_empty(datasets.load_dataset(local, entry.config, **options), entry)
        path = Path(suite.place(entry.path))
        if path.is_dir():
            return _not_empty(_read_folder(path, options), entry)
        reader = _READERS.get(path.suffix.lower())
        if not path.is_file():
            raise RecipeError(
                f"{path}: no such file or folder; data paths are seen from the suite's folder, {suite.folder}"
            )
        if reader is None:
            raise RecipeError(f"{path}: is not a kind of data file that Plait reads ({', '.join(_READERS)})")
        if reader == "json":
            check_depth(path)
        if path.suffix.lower() == ".tsv":
            options["sep"] = "\t"
        return _not_empty(datasets.load_dataset(reader, data_files=str(path), **options), entry)
    except (RecipeError, CheckpointError):
        raise
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise CheckpointError(_NO_ROWS.format(where=entry.where)) from None
        raise CheckpointError(
            f"{entry.where}: cannot be read: {_cause(error)} (is it whole, and of the kind its name says?)"
        ) from None


def _read_folder(path: Path, options: dict[str, Any]) -> Any:
    """An image folder: one folder of images for every class, whose name is the class; or images alone, unlabeled."""
    import datasets

    files, labels = [], []
    names = sorted(item.name for item in path.iterdir() if item.is_dir() and not item.name.startswith("."))
    for index, name in enumerate(names):
        for root, folders, found in os.walk(path / name):
            folders.sort()
            images = sorted(file for file in found if Path(file).suffix.lower() in _IMAGE_SUFFIXES)
            files += [str(Path(root) / file) for file in images]
            labels += [index] * len(images)
    if not files:
        files = [str(item) for item in sorted(path.iterdir()) if item.suffix.lower() in _IMAGE_SUFFIXES]
        if not files:
            raise CheckpointError(
                f"{path}: holds no images, alone or in folders named by class; give such a folder, or a data file"
            )
        return datasets.Dataset.from_dict({"image": files}, features=datasets.Features({"image": datasets.Image()}))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"image": files, "label": labels}, features=features)


def _not_empty(table: Any, entry: DataEntry) -> Any:
    if len(table) == 0:
        raise CheckpointError(_NO_ROWS.format(where=entry.where))
    return table


def _input_columns(table: Any, entry: DataEntry) -> list[str]:
    wanted = [entry.input] if isinstance(entry.input, str) else entry.input
    have = table.column_names
    if wanted is None:
        wanted = [next((name for name in _INPUTS if name in have), "")]
        if wanted == [""]:
            raise RecipeError(
                f"{entry.where}: no input column: its columns are {', '.join(have)}; say which with input:"
            )
    for name in wanted:
        if name not in have:
            raise RecipeError(f"{entry.where}: has no column '{name}': its columns are {', '.join(have)}")
    return wanted


def _other_label(table: Any, entry: DataEntry) -> str | None:
    """The label column when it goes by another usual name; a name that the suite spelt must exist."""
    if entry.label != "label":
        raise RecipeError(
            f"{entry.where}: labels missing: has no column '{entry.label}': its columns are "
            f"{', '.join(table.column_names)}"
        )
    return next((name for name in _LABELS if name in table.column_names), None)


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
