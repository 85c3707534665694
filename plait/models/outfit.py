"""What a suite says of its models: the base, pooling, heads, possible answers; and how an input becomes a question."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from plait.errors import CheckpointError, RecipeError
from plait.models.answers import AnswerNet
from plait.models.families import family_of
from plait.models.heads import Head, head_of, id2label_names, read_head
from plait.models.net import Net, read_config
from plait.models.zero_shot import zero_shot_head
from plait.plan import make_plan
from plait.recipe import load_recipe
from plait.sources import TensorSpec, open_source
from plait.suites.data import Split
from plait.suites.definition import Suite

Classes = dict[str, list[str] | None]
"""Task → class names in the order of the labels, where the data has names."""


def outfit(net: Net, suite: Suite, classes: Classes, head: Callable[[str], Head] | None = None) -> Net:
    """The net with what its tasks (those of `classes`) need to answer: heads, or the possible answers.

    `head` finds a task's head where it is not the suite's.
    """
    if net.family.answers != "head":
        answering = AnswerNet(net.body, net.family, net.processor, net.pooling, net.max_length)
        answering.answers = {task: answers_of(suite, task, names) for task, names in classes.items()}
        return answering
    net.add_heads({task: head(task) if head else suite_head(suite, task, classes[task]) for task in classes}, classes)
    return net


def question(net: Net, suite: Suite, task: str, split: Split, row: int) -> Any:
    """The input in one row as this net reads it: for models that answer in text, inside the task's prompt."""
    if not isinstance(net, AnswerNet):
        return split[row]
    prompt = suite.tasks[task].prompt
    columns = split.columns(row)
    if prompt is None:
        return next(iter(columns.values()))
    try:
        return prompt.format(**{"text": next(iter(columns.values())), **columns})
    except KeyError as error:
        known = ", ".join(f"{{{name}}}" for name in dict.fromkeys([*columns, "text"]))
        raise RecipeError(
            f"{suite.where('tasks', task, 'prompt')}: names {error}, which is not an input column; write "
            f"{known}, or add the column to input:"
        ) from None
    except (IndexError, ValueError, AttributeError, TypeError) as error:
        raise RecipeError(
            f"{suite.where('tasks', task, 'prompt')}: is no template ({error}); columns stand in braces by "
            "name, and a brace that means itself is written twice"
        ) from None


def base_folder(suite: Suite) -> Path:
    """The local folder of a suite's base."""
    return source_folder(suite.place(suite.base))


def pooling_of(suite: Suite) -> Any:
    """What text heads read: as the suite says, else as the experts' architecture does."""
    if suite.pooling is not None:
        return suite.pooling
    folder = source_folder(suite.place(next(iter(suite.tasks.values())).expert))
    if not (folder / "config.json").is_file():
        folder = base_folder(suite)
    config = read_config(folder, str(folder))
    return family_of(config, str(folder)).pooling(config)


def suite_head(suite: Suite, task: str, classes: list[str] | None) -> Head:
    """A task's head as the suite has it: its own file, zero-shot from the text tower, or the expert's."""
    entry = suite.tasks[task]
    if entry.head == "zero_shot":
        return zero_shot_head(suite, task, classes)
    if entry.head is not None:
        return read_head(head_file(suite, task))
    return expert_head(suite, task)


def head_file(suite: Suite, task: str) -> Path:
    """The file that a task's `head:` names."""
    path = Path(suite.place(suite.tasks[task].head or ""))
    if not path.is_file():
        raise RecipeError(
            f"{suite.where('tasks', task, 'head')}: no such file: {path}; give a safetensors file, seen from the "
            "suite's folder, or zero_shot"
        )
    return path


def expert_head(suite: Suite, task: str) -> Head:
    """The tensors that only the task's expert has."""
    part = suite.only([task])
    plan = make_plan(load_recipe(part.recipe("task_arithmetic")))
    try:
        items = plan.heads.get(task)
        if not items:
            raise CheckpointError(
                f"{suite.where('tasks', task)}: the expert {suite.tasks[task].expert} brings no head of its own; "
                "name the head's file with head:"
            )
        tensors = {
            i.stored: i.read(0, TensorSpec(i.stored, i.shape, i.dtype).numel).reshape(i.shape).clone() for i in items
        }
        labels = next(model for model in plan.models if model.name == task).labels
        return head_of(tensors, suite.place(suite.tasks[task].expert), id2label_names(labels))
    finally:
        plan.library.close()


def answers_of(suite: Suite, task: str, classes: list[str] | None) -> list[str]:
    """What a model that answers in text may say, in the order of the labels."""
    entry = suite.tasks[task]
    found = entry.answers or classes
    if found is None and "exact_match" not in entry.metrics:
        raise RecipeError(
            f"{suite.where('tasks', task)}: a model that answers in text needs the possible answers; add answers:, or "
            "metrics: [exact_match]"
        )
    return found or []


def source_folder(spec: str) -> Path:
    """The local folder of a model."""
    source = open_source(spec)
    try:
        return source.folder
    finally:
        source.close()
