"""Data from YAML or JSON text that remembers on which line every key stands."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from plait.errors import RecipeError

Path_ = tuple[str | int, ...]
_MAX_BYTES = 1 << 18
_MAX_NODES = 50_000
"""Values in a file with all its aliases written out: a few lines of aliases of aliases make billions."""
_MAX_DEPTH = 60
"""Levels of nesting; a recipe has less than ten."""
_TOO_DEEP = "{source}: is nested too deeply; a recipe needs less than ten levels"
_NO_VALUE = object()


class Located:
    """Plain data, and for every path in it the line where it stands (None for data that never was a file)."""

    def __init__(self, data: Any, source: str | None = None, lines: dict[Path_, int] | None = None) -> None:
        self.data = data
        self.source = source
        self._lines = lines or {}

    def where(self, path: Sequence[str | int]) -> str:
        """`recipe.yaml, line 7: models[1].parameters.density`."""
        text = ""
        for part in path:
            text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
        place = tuple(path)
        while place and place not in self._lines:
            place = place[:-1]
        line = self._lines.get(place)
        prefix = f"{self.source}, line {line}: " if self.source and line else f"{self.source}: " if self.source else ""
        return prefix + (text or "recipe")


def parse(text: str, source: str) -> Located:
    """Parse YAML (JSON is YAML). Only plain data: tags that name types or code are refused, as are repeated keys."""
    if _brackets(text) > 8 * _MAX_DEPTH:  # PyYAML's time grows with the square of the open brackets
        raise RecipeError(_TOO_DEEP.format(source=source))
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        raise RecipeError(_TOO_DEEP.format(source=source)) from None
    except (ValueError, OverflowError) as error:  # of a directive or an escape that is none
        raise RecipeError(f"{source}: not valid YAML: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{source}{line}: not valid YAML: {problem}") from None
    lines: dict[Path_, int] = {}
    data = None if node is None else _build(node, (), lines, source, set())
    return Located(data, source, lines)


def _brackets(text: str) -> int:
    """The most brackets that are open at once, those in texts and comments counted too."""
    depth = deepest = 0
    for mark in re.findall(r"[\[\]{}]", text):
        depth = depth + 1 if mark in "[{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest


def parse_file(path: Path) -> Located:
    """`parse` of a file, with sentences for one that is missing, too long, or not text."""
    try:
        with path.open("rb") as file:  # not by its size: a device has none
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise RecipeError(f"{path}: larger than {_MAX_BYTES // 1024} kB: this is not a recipe")
        return parse(content.decode("utf-8"), str(path))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file; `plait init` prints one to start from") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise RecipeError(f"{path}: not a text file; a recipe is YAML or JSON") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _build(node: yaml.Node, path: Path_, lines: dict[Path_, int], source: str, open_nodes: set[int]) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if len(lines) > _MAX_NODES:
        raise RecipeError(
            f"{source}: holds more than {_MAX_NODES} values once its aliases are written out; remove them"
        )
    if len(path) > _MAX_DEPTH:
        raise RecipeError(_TOO_DEEP.format(source=source))
    if id(node) in open_nodes:
        raise RecipeError(f"{source}, line {node.start_mark.line + 1}: an anchor contains itself")
    open_nodes.add(id(node))
    try:
        if isinstance(node, yaml.MappingNode):
            result: dict[str, Any] = {}
            for key_node, value_node in node.value:
                line = key_node.start_mark.line + 1
                if not isinstance(key_node, yaml.ScalarNode):
                    raise RecipeError(f"{source}, line {line}: a key must be a text, not a list or mapping")
                key = str(key_node.value)
                if key in result:
                    raise RecipeError(f"{source}, line {line}: the key '{key}' is given twice")
                lines[(*path, key)] = line
                result[key] = _build(value_node, (*path, key), lines, source, open_nodes)
            return result
        if isinstance(node, yaml.SequenceNode):
            return [_build(item, (*path, i), lines, source, open_nodes) for i, item in enumerate(node.value)]
        try:
            value = yaml.SafeLoader("").construct_object(node)
        except (yaml.YAMLError, ValueError, AttributeError, KeyError, IndexError, TypeError, OverflowError):
            value = _NO_VALUE  # PyYAML lets through what its tags' own parsers raise
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise RecipeError(
            f"{source}, line {node.start_mark.line + 1}: the tag {node.tag} is not plain data; "
            "a recipe holds texts, numbers, lists and mappings only (quotes make a text of anything)"
        )
    finally:
        open_nodes.discard(id(node))
