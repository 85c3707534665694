"""A model's tokens and their ids, read from the files beside its weights, and a tokenizer with more tokens in it.

Only the map token → id is needed to match vocabularies, so no tokenizer is built from a model's files: they are read
as data, with bounds. The `tokenizers` library is needed for one thing, writing a union.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.errors import CheckpointError, MachineError
from plait.sources import files

_FILE_LIMIT = 128 << 20
"""Bytes; the largest real tokenizer.json have a third of it."""
_MOST_TOKENS = 1 << 22
"""No vocabulary comes near it, and an id is the number of a row, so a wild one must not become memory."""
_TOKEN_ID = ("_token_id", "_token_index")
_FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")
_PIECES = (".model", ".tiktoken", "tekken.json")
"""Tokenizers that only their own libraries can read."""
_STEMS = {
    "tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens", "vocab", "merges", "spiece", "source",
    "target", "sentencepiece.bpe", "sentencepiece", "chat_template", "tekken", "normalizer", "bpe.codes", "emoji",
}  # fmt: skip


@dataclass(frozen=True)
class Tokens:
    """The vocabulary of one tokenizer."""

    path: Path
    """The file it was read from."""
    sha256: str
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    """Tokens that are matched in the text before the tokenizer's model sees it → how."""


def is_tokenizer_file(name: str) -> bool:
    """Whether a side file (relative name) belongs to the tokenizer, as against config.json and the rest."""
    if "/" in name:
        return name.startswith("additional_chat_templates/")
    stem, _, ending = name.rpartition(".")
    return stem in _STEMS or ending in ("model", "tiktoken")


def read_tokens(folder: Path) -> Tokens | None:
    """Tokens of the tokenizer in a folder; None when there is no tokenizer of any kind.

    Raises CheckpointError for files that are damaged, and for tokenizers in a form that is not read here.
    """
    if (path := folder / "tokenizer.json").exists():
        data, raw = files.read_object(path, "the tokenizer", _FILE_LIMIT)
        model = data.get("model")
        ids = _model_ids(model.get("vocab") if isinstance(model, Mapping) else None, path)
        added = _added_entries(data.get("added_tokens") or [], path)
        ids.update({token: entry["id"] for token, entry in added.items()})
        flags = {token: {key: bool(entry.get(key)) for key in _FLAGS} for token, entry in added.items()}
        return Tokens(path, files.sha256(raw), _checked(ids, path), flags)
    if (path := folder / "vocab.json").exists():
        ids, raw = files.read_object(path, "the vocabulary", _FILE_LIMIT)
    elif (path := folder / "vocab.txt").exists():
        raw = _read(path)
        ids = _lines(raw, path)
    else:
        _refuse_pieces(folder)
        return None
    extra: Mapping[str, Any] = {}
    if (more := folder / "added_tokens.json").exists():
        extra, also = files.read_object(more, "the added tokens", _FILE_LIMIT)
        raw += also
    flags = {token: {key: key == "special" for key in _FLAGS} for token in extra}
    return Tokens(path, files.sha256(raw), _checked({**ids, **extra}, path), flags)


def extend(base: Tokens, new: Iterable[tuple[str, Mapping[str, bool] | None]]) -> tuple[bytes, dict[str, int]]:
    """The base's tokenizer.json with more tokens, in the order given, and the token → id map it then has.

    A token that its own tokenizer matched in the text keeps its flags. Any other is matched as a word of its own:
    inside of words it would change how texts of the base are cut.
    """
    if base.path.name != "tokenizer.json":
        raise CheckpointError(
            f"{base.path.parent}: a union needs a tokenizer.json to add tokens to, and there is only {base.path.name}. "
            f"{_how_to_save(base.path.parent)}"
        )
    try:
        from tokenizers import AddedToken, Tokenizer
    except ImportError:
        raise MachineError(
            "tokenizer_source: union adds tokens with the tokenizers library: pip install tokenizers"
        ) from None
    text = files.read_object(base.path, "the tokenizer", _FILE_LIMIT)[1].decode()
    try:
        tokenizer = Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library panics on some files, and its panics are not Exceptions
        raise CheckpointError(f"{base.path}: is not a usable tokenizer ({error}). Download the file again.") from None
    for token, flags in new:
        how = dict(flags) if flags is not None else {"single_word": True}
        add = tokenizer.add_special_tokens if how.get("special") else tokenizer.add_tokens
        add([AddedToken(token, **how)])
    ids = tokenizer.get_vocab(with_added_tokens=True)
    if len(set(ids.values())) < len(ids):
        raise CheckpointError(
            f"{base.path}: its ids have gaps, so tokens that are added get ids that are taken. Name the model whose "
            "tokenizer to use (tokenizer_source: its name) in place of union."
        )
    return tokenizer.to_str(pretty=True).encode(), dict(ids)


def refit(
    config: Mapping[str, Any], old: Mapping[str, int], new: Mapping[str, int], size: int | None, rows: int
) -> dict[str, Any]:
    """A configuration with `rows` for vocab_size, and with the new ids of the tokens it names (eos_token_id, …).

    Parts with a vocabulary other than `size` are left alone. A token that is gone leaves None.
    """
    tokens = {place: token for token, place in old.items()}

    def moved(place: Any) -> Any:
        return new.get(tokens[place]) if type(place) is int and place in tokens else place

    def fit(part: Mapping[str, Any]) -> dict[str, Any]:
        if part.get("vocab_size", size) != size:
            return dict(part)
        result: dict[str, Any] = {}
        for key, value in part.items():
            if isinstance(value, Mapping):
                result[key] = fit(value)
            elif key == "vocab_size":
                result[key] = rows
            elif key.endswith(_TOKEN_ID):
                many = [place for place in map(moved, value) if place is not None] if isinstance(value, list) else None
                result[key] = moved(value) if many is None else many
            else:
                result[key] = value
        return result

    return fit(config)


def no_tokenizer(folder: Path, label: str) -> CheckpointError:
    """For a model whose tokens are needed and which has no tokenizer."""
    return CheckpointError(
        f"{label}: has no tokenizer.json, vocab.json or vocab.txt in {folder}, and tokenizer_source needs its tokens. "
        "Copy the tokenizer files of the model it was trained from into it, or leave tokenizer_source out."
    )


def _model_ids(vocab: Any, path: Path) -> dict[str, Any]:
    """BPE, WordPiece and WordLevel have a table; Unigram a list of [token, score], whose places are the ids."""
    if isinstance(vocab, dict):
        return vocab
    if isinstance(vocab, list) and all(
        isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) for entry in vocab
    ):
        return {token: place for place, (token, _) in enumerate(vocab)}
    raise CheckpointError(f"{path}: has no table of tokens under model.vocab. {_how_to_save(path.parent)}")


def _added_entries(entries: Any, path: Path) -> dict[str, Mapping[str, Any]]:
    if not isinstance(entries, list) or not all(
        isinstance(entry, Mapping) and isinstance(entry.get("content"), str) and "id" in entry for entry in entries
    ):
        raise CheckpointError(f"{path}: added_tokens is not a list of {{id, content, …}}. Download the file again.")
    return {entry["content"]: entry for entry in entries}


def _checked(ids: Mapping[str, Any], path: Path) -> Mapping[str, int]:
    for token, place in ids.items():
        if type(place) is not int or not 0 <= place < _MOST_TOKENS:
            raise CheckpointError(
                f"{path}: token {token[:40]!r} has the id {str(place)[:40]!r}, which is no number of a row. "
                "Download the file again."
            )
    if not ids:
        raise CheckpointError(f"{path}: holds no tokens. Download the file again.")
    return ids


def _lines(raw: bytes, path: Path) -> dict[str, int]:
    """One token a line, as BERT has it."""
    try:
        lines = raw.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not UTF-8 text ({error}). Download the file again.") from None
    if lines[-1] == "":
        lines.pop()
    return {line.removesuffix("\r"): place for place, line in enumerate(lines)}


def _read(path: Path) -> bytes:
    descriptor = files.open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > _FILE_LIMIT:
            raise CheckpointError(f"{path}: the vocabulary has {size} bytes; the limit is {_FILE_LIMIT}.")
        return files.read_bytes(descriptor, 0, size, path)
    finally:
        os.close(descriptor)


def _refuse_pieces(folder: Path) -> None:
    found = sorted(path.name for path in folder.iterdir() if path.name.endswith(_PIECES))
    if found:
        raise CheckpointError(
            f"{folder / found[0]}: this kind of tokenizer is not read here, and there is no tokenizer.json. "
            f"{_how_to_save(folder)}"
        )


def _how_to_save(folder: Path) -> str:
    return (
        "Save one with transformers: "
        f"AutoTokenizer.from_pretrained('{folder}', use_fast=True).save_pretrained('{folder}')."
    )
