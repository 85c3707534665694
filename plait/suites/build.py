"""Building a suite: base, data, experts, suite.yaml, in the user's cache. Interrupted builds go on where they were."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

import plait
from plait.errors import MachineError, RecipeError, nearest
from plait.stages import Silent
from plait.suites.builtin import RECIPES, How, Recipe
from plait.suites.definition import SPLITS
from plait.suites.places import suite_folder
from plait.suites.train import make_expert
from plait.suites.train_lora import LoraSettings, make_adapter
from plait.threads import usable_threads

_told: Any = None


def build_suite(
    name: str,
    *,
    data: Path | None = None,
    tasks: list[str] | None = None,
    workers: int | None = None,
    progress: Any = None,
) -> Path:
    """Make a suite of ours and return its folder; what is there already is kept.

    Experts are trained `workers` at a time, each in a process and on a thread of its own.
    """
    if name not in RECIPES:
        raise RecipeError(f"{name}: is no suite that can be built{nearest(name, RECIPES)}")
    recipe, out = RECIPES[name], suite_folder(name)
    source = data or _data_folder(recipe)
    for task in tasks or []:
        if task not in recipe.tasks:
            raise RecipeError(f"{name}: the suite has no task '{task}'{nearest(task, recipe.tasks)}")
    wanted = {task: settings for task, settings in recipe.tasks.items() if tasks is None or task in tasks}
    _base(recipe, out / "base")
    for task in wanted:
        (recipe.write or _copy_data)(source, task, out / "data" / task)
    _experts(recipe, out, wanted, workers or usable_threads(), progress or Silent())
    _write_suite(name, recipe, out)
    return out


def _base(recipe: Recipe, out: Path) -> None:
    if (out / "config.json").is_file():
        return
    scratch = out.with_name(f".base-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        recipe.base(scratch)
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _data_folder(recipe: Recipe) -> Path:
    folder = Path(plait.__file__).resolve().parents[1] / "data" / recipe.data
    if not folder.is_dir():
        raise MachineError(
            f"the data of this suite is in Plait's source, in data/{recipe.data}, and not in the installed package: "
            f"clone the source, or unpack its sdist, and say --data PATH/data/{recipe.data}"
        )
    return folder


def _copy_data(source: Path, task: str, out: Path) -> None:
    for split in SPLITS:
        path = source / task / f"{split}.parquet"
        if not path.is_file():
            raise RecipeError(f"{path}: is missing; give the folder that holds every task's three splits")
        out.mkdir(parents=True, exist_ok=True)
        scratch = out / f".{split}-{os.getpid()}"
        shutil.copyfile(path, scratch)
        os.replace(scratch, out / path.name)


def _experts(recipe: Recipe, out: Path, tasks: Mapping[str, How], workers: int, progress: Any) -> None:
    todo = {
        task: how for task, how in tasks.items() if _made_of(out, task) != _makes(recipe.max_length, out, task, how)
    }
    if not todo:
        return
    progress.stage(f"train {len(todo)} experts", sum(settings.steps for settings in todo.values()), "steps")
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    queue = context.Queue()
    # Long ones first, so that no worker is left alone with one at the end.
    order = sorted(todo, key=lambda task: -todo[task].steps * todo[task].batch_size)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_listen, initargs=(queue,)) as pool:
        futures = [pool.submit(_expert, recipe.max_length, out, task, todo[task]) for task in order]
        try:
            while not all(future.done() for future in futures):
                wait(futures, timeout=0.5, return_when=FIRST_EXCEPTION)
                while not queue.empty():
                    progress.advance(queue.get())
                if any(future.done() and future.exception() for future in futures):
                    break
        finally:
            for future in futures:
                future.cancel()
    for future in futures:
        if not future.cancelled():
            future.result()


def _listen(queue: Any) -> None:
    global _told
    _told = queue
    # Before torch is loaded in this process: its threads would only get in each other's way.
    os.environ["OMP_NUM_THREADS"] = "1"


def _expert(max_length: int, out: Path, task: str, settings: How) -> None:
    start = time.perf_counter()
    base, data, expert = out / "base", out / "data" / task, out / "experts" / task
    if isinstance(settings, LoraSettings):
        make_adapter(base, data, expert, settings, max_length=max_length, tell=lambda step: _told.put(1))
    else:
        make_expert(base, data, expert, settings, max_length=max_length, tell=lambda step: _told.put(1))
    record = {**_makes(max_length, out, task, settings), "seconds": round(time.perf_counter() - start, 1)}
    (out / "experts" / task / "training.yaml").write_text(yaml.safe_dump(record), encoding="utf-8")


def _makes(max_length: int, out: Path, task: str, settings: How) -> dict[str, Any]:
    """All that decides what an expert becomes, as plain data."""
    name = "train.jsonl" if isinstance(settings, LoraSettings) else "train.parquet"
    data = hashlib.sha256((out / "data" / task / name).read_bytes()).hexdigest()
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()}
    return {**plain, "max_length": max_length, "train": data}


def _made_of(out: Path, task: str) -> dict[str, Any] | None:
    """The same of the expert that is there; None when there is none."""
    path = out / "experts" / task / "training.yaml"
    if not path.is_file():
        return None
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):  # cut off while it was written: trained again
        return None
    found.pop("seconds", None)
    return found


def _write_suite(name: str, recipe: Recipe, out: Path) -> None:
    tasks = {
        task: {
            "expert": f"experts/{task}",
            **(_asked(how) if isinstance(how, LoraSettings) else {}),
            "data": {split: f"data/{task}/{split}{recipe.suffix}" for split in SPLITS},
        }
        for task, how in recipe.tasks.items()
        if (out / "experts" / task / "training.yaml").is_file()
    }
    suite: dict[str, Any] = {"name": name, "base": "base"}
    if recipe.pooling is not None:
        suite["pooling"] = recipe.pooling
    if recipe.max_length != Recipe.max_length:
        suite["max_length"] = recipe.max_length
    scratch = out / f".suite-{os.getpid()}"
    scratch.write_text(yaml.safe_dump({**suite, "tasks": tasks}, sort_keys=False), encoding="utf-8")
    os.replace(scratch, out / "suite.yaml")


def _asked(how: LoraSettings) -> dict[str, Any]:
    """A task of a model that answers in text: one of its classes, or what it writes."""
    if how.classes is None:
        return {"prompt": how.prompt, "metrics": ["exact_match"]}
    return {"prompt": how.prompt, "classes": list(how.classes)}
