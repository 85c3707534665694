"""What the examples, the README and the docs show is understood: recipes are valid, commands exist."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from plait import cli
from plait.errors import RecipeError
from plait.evaluate.sweep import parse_axis
from plait.methods import all_methods
from plait.methods.compose import method_of
from plait.plan import fit_options
from plait.recipe import Recipe, load_recipe
from plait.settings import Resolver
from plait.suites.definition import read_suite, suite_of

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
YAMLS = [path for suffix in ("yaml", "yml") for path in sorted((ROOT / "examples").rglob(f"*.{suffix}"))]
SUITES = [path for path in YAMLS if path.name == "suite.yaml"]
FILES = [path for path in YAMLS if path not in SUITES]


def blocks(text: str, *languages: str) -> list[str]:
    """Fenced code blocks of a Markdown text."""
    found = re.findall(r"^```(\w+)[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [body for language, body in found if language in languages]


def is_recipe(text: str) -> bool:
    """Whether a YAML block starts with a key of a recipe."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    key = re.match(r"([A-Za-z_]+):", lines[0]) if lines else None
    return key is not None and key[1] in Recipe.model_fields and "\ntasks:" not in text


def check(data: Any) -> None:
    """All that can be checked without the models; RecipeError otherwise."""
    method, recipe = method_of(load_recipe(data))
    Resolver(recipe, method, recipe.names()).check_names()
    fit_options(recipe, method)
    if method.base == "required" and recipe.base_model is None:
        raise RecipeError(f"{method.name} needs base_model")
    least, most = method.experts
    groups = [[s.model for s in piece.sources] for piece in recipe.slices or []] or [
        [m.model for m in recipe.entries()]
    ]
    for group in groups:
        count = len([model for model in group if method.base == "unused" or model != recipe.base_model])
        if count < least or (most is not None and count > most):
            raise RecipeError(f"{method.name} does not take {count} models")


def check_block(text: str) -> None:
    """A whole recipe, or a part of one, which is completed so that it means something."""
    data = yaml.safe_load(text)
    models = {} if data.keys() & {"models", "slices"} else {"models": [{"model": "./a"}, {"model": "./b"}]}
    if data.keys() & {"merge_method", "combine"}:
        return check({**data, **models} if models else _file(text))
    errors = []
    for name in all_methods():  # parameters alone: of some method
        try:
            return check({"merge_method": name, "base_model": "./base", **models, **data})
        except RecipeError as error:
            errors.append(str(error))
    raise RecipeError("; ".join(sorted(set(errors))))


def _file(text: str) -> Recipe:
    """Through a file's text, so that what only text can have wrong (a key twice) is seen."""
    from plait import recipe, yamlfile

    return recipe._validate(yamlfile.parse(text, "block"), ROOT)


def commands(text: str) -> Iterator[list[str]]:
    """The words of every `plait …` in shell lines: without prompts, comments, redirections and what follows."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.commenters = "#"
        lexer.whitespace_split = True
        words = [*lexer, ";"]
        while words:
            end = next(i for i, word in enumerate(words) if word and set(word) <= set(";|&<>()"))
            words, part = words[end + 1 :], words[:end]
            if part[:1] == ["plait"]:
                yield part[1:]
            elif part[:3] == ["python", "-m", "plait"]:
                yield part[3:]


def check_command(words: list[str]) -> None:
    """Parse without running. Raises for verbs, options and values that do not exist, and for wrong methods."""
    group: Any = typer.main.get_command(cli.app)
    if words[:1] in ([], ["--help"]):
        return
    verb, *rest = words
    assert verb in group.commands, f"plait has no verb {verb}"
    if "--help" in rest:
        return
    given = {} if verb == "suite" else group.commands[verb].make_context(verb, rest).params
    if verb in ("merge", "fit"):
        keys = ("where", "method", "base", "expert", "settings", "dtype", "seed", "data")
        asked: Any = [given.get(key) for key in keys]  # a fit has no dtype
        recipe, _ = cli._recipe_and_out(*asked)
        if given["method"] is not None:
            check(recipe)
    elif verb == "suite":
        sub, *more = rest
        group.commands[verb].commands[sub].make_context(sub, more)
    elif verb == "sweep":
        assert [parse_axis(text) for text in given["settings"] or []] or given["experts"]
    elif verb in ("compare", "eval"):
        assert given["suite"]
    elif verb in ("init", "methods"):
        name = given.get("method") or given.get("name")
        assert name is None or name in all_methods(), f"there is no method {name}"


BLOCKS = [
    pytest.param(body, id=f"{page.name}-{number}")
    for page in PAGES
    if page.exists()
    for number, body in enumerate(blocks(page.read_text(), "yaml", "yml"))
    if is_recipe(body)
]
SUITE_BLOCKS = [
    pytest.param(body, id=f"{page.name}-{number}")
    for page in PAGES
    if page.exists()
    for number, body in enumerate(blocks(page.read_text(), "yaml", "yml"))
    if re.search(r"^tasks:", body, re.MULTILINE)
]
COMMANDS = [
    pytest.param(words, id=f"{page.name}-{' '.join(words)[:40]}")
    for page in PAGES
    if page.exists()
    for body in blocks(page.read_text(), "sh", "bash", "console", "shell")
    for words in commands(body)
]
PYTHON = [
    pytest.param(body, id=f"{page.name}-{number}")
    for page in PAGES
    if page.exists()
    for number, body in enumerate(blocks(page.read_text(), "python", "py"))
]


def test_there_is_something_to_check() -> None:
    assert FILES
    assert BLOCKS
    assert COMMANDS


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.relative_to(ROOT / "examples").as_posix())
def test_suites_of_the_examples(path: Path) -> None:
    suite = read_suite(path)
    for task, entry in suite.tasks.items():
        assert Path(suite.place(entry.expert)).is_dir(), task
        assert all(Path(suite.place(str(data.path))).is_file() for data in entry.data.values()), task


@pytest.mark.parametrize("block", SUITE_BLOCKS)
def test_suites_of_the_docs(block: str) -> None:
    suite_of(yaml.safe_load(block))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT / "examples").as_posix())
def test_recipes_of_the_examples(path: Path) -> None:
    check(path)


@pytest.mark.parametrize("block", BLOCKS)
def test_recipes_of_the_docs(block: str) -> None:
    check_block(block)


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_of_the_docs(words: list[str]) -> None:
    check_command(words)


@pytest.mark.parametrize("block", PYTHON)
def test_python_of_the_docs(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "plait":
            module = importlib.import_module(node.module or "")
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "plait":
            assert hasattr(importlib.import_module("plait"), node.attr), f"plait.{node.attr}"


@pytest.mark.parametrize(
    "block",
    [
        "merge_metod: ties\nmodels: []",
        "merge_method: tise\nbase_model: ./b\nmodels: [{model: ./a}]",
        "merge_method: ties\nbase_model: ./b\nmodels: [{model: ./a}]\nparameters: {densty: 1}",
        "merge_method: ties\nbase_model: ./b\nmodels: [{model: ./a, parameters: {density: [1, 7]}}]",
        "merge_method: ties\nmodels: [{model: ./a}]",
        "merge_method: slerp\nbase_model: ./b\nmodels: [{model: ./a}, {model: ./c}]\nparameters: {t: 0.5}",
        "merge_method: linear\nmodels: [{model: ./a}]\nseed: 1\nseed: 2",
        "combine: elec\nbase_model: ./b\nmodels: [{model: ./a}]",
        "parameters: {densty: 0.5}",
        "models: [{model: ./a, nam: a}]",
    ],
)
def test_a_wrong_recipe_would_be_seen(block: str) -> None:
    with pytest.raises(RecipeError):
        check_block(block)


@pytest.mark.parametrize("block", ["parameters: {density: [0.2, 0.9]}", "seed: 3", "keep: {base: [lm_head]}"])
def test_parts_of_recipes_are_fine(block: str) -> None:
    assert is_recipe(block)
    check_block(block)


@pytest.mark.parametrize(
    "line",
    [
        "plait mrege recipe.yaml out",
        "plait merge recipe.yaml",
        "plait plan recipe.yaml --jsn",
        "plait merge recipe.yaml out --threads many",
        "make && plait init tise > recipe.yaml",
        "plait merge --method ties --base b -e a -s densty=0.2 out",
        "plait merge -m ties -e a out",
        "plait methods drae",
    ],
)
def test_a_wrong_command_would_be_seen(line: str) -> None:
    (words,) = commands(line)
    with pytest.raises((AssertionError, RecipeError, *_usage_errors())):
        check_command(words)


def _usage_errors() -> list[type[Exception]]:
    """Click's UsageError, of click itself or of the copy that newer versions of typer carry."""
    for name in ("typer._click.exceptions", "click.exceptions"):
        try:
            return [importlib.import_module(name).UsageError]
        except ImportError:
            continue
    return []


def test_commands_are_found_in_shell_lines() -> None:
    text = (
        "$ plait init ties > recipe.yaml   # plait is not here\n"
        "cd x && plait check recipe.yaml --json | jq .ok\n"
        "plait merge --method ties \\\n  --set density=0.2 out\n"
        "pip install plait; python -m plait plan 'a file.yaml'\n"
    )
    assert list(commands(text)) == [
        ["init", "ties"],
        ["check", "recipe.yaml", "--json"],
        ["merge", "--method", "ties", "--set", "density=0.2", "out"],
        ["plan", "a file.yaml"],
    ]
