"""`plait inspect`: every number against numpy, on real small checkpoints; the same for any number of threads."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import torch
from safetensors.torch import load_file, save_file

import plait
from plait.engine import Engine
from plait.errors import RecipeError
from plait.inspect import inspect_plan
from plait.stages import Silent


def look(data: dict[str, Any], threads: int = 1) -> dict[str, Any]:
    plan = plait.make_plan(plait.load_recipe(data))
    return inspect_plan(plan, Engine(threads=threads, memory=10**8, device="cpu", progress=Silent()))


def recipe(llama: dict[str, Path], *names: str, method: str = "task_arithmetic") -> dict[str, Any]:
    models = [{"model": str(llama[name]), "name": name} for name in names]
    return {"merge_method": method, "base_model": str(llama["base"]), "models": models}


def flat(folder: Path, names: list[str]) -> np.ndarray:
    tensors = pico.read(folder)
    return np.concatenate([tensors[name].numpy().reshape(-1) for name in names])


def expected(llama: dict[str, Path], tasks: list[str], names: list[str]) -> dict[str, Any]:
    """The report over some tensors, the plain way. Differences in float32, as task vectors are; sums in float64."""
    base = flat(llama["base"], names)
    taus = [(flat(llama[task], names) - base).astype(np.float64) for task in tasks]
    norms = [float(np.linalg.norm(tau)) for tau in taus]
    count = len(tasks)
    cosine, agree = np.zeros((count, count)), np.zeros((count, count))
    for i, j in itertools.product(range(count), repeat=2):
        if norms[i] and norms[j]:
            cosine[i, j] = taus[i] @ taus[j] / norms[i] / norms[j]
        both = (taus[i] != 0) & (taus[j] != 0)
        agree[i, j] = np.mean(np.sign(taus[i][both]) == np.sign(taus[j][both])) if both.any() else 0
    signs = np.sign(np.stack(taus))
    touched = (signs != 0).any(0)
    unanimous = ~((signs > 0).any(0) & (signs < 0).any(0)) & touched
    base_norm = float(np.linalg.norm(base.astype(np.float64)))
    return {
        "parameters": base.size,
        "base_norm": base_norm,
        "norm": dict(zip(tasks, norms, strict=True)),
        "relative_norm": {task: norm / base_norm for task, norm in zip(tasks, norms, strict=True)},
        "cosine": cosine.tolist(),
        "sign_agreement": agree.tolist(),
        "unanimous": unanimous.sum() / touched.sum() if touched.any() else 0,
        "changed": touched.mean(),
    }


def close(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        if isinstance(value, list):
            np.testing.assert_allclose(got[key], value, rtol=1e-9, atol=1e-12, err_msg=key)
        else:
            assert got[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key


@pytest.fixture(scope="module")
def found(llama: dict[str, Path]) -> dict[str, Any]:
    return look(recipe(llama, "one", "three", "two"))


TASKS = ["one", "three", "two"]


def test_every_tensor_group_and_the_whole(found: dict[str, Any], llama: dict[str, Path]) -> None:
    names = sorted(pico.read(llama["base"]))
    assert found["tasks"] == TASKS
    assert sorted(found["tensors"]) == names
    for name in names:
        close(found["tensors"][name], expected(llama, TASKS, [name]))
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[re.sub(r"\.\d+\.", ".*.", name).rsplit(".", 1)[0]].append(name)
    assert set(found["groups"]) == set(groups)
    assert len(groups["model.layers.*.mlp.up_proj"]) == 3
    for kind, members in groups.items():
        close(found["groups"][kind], expected(llama, TASKS, members))
    close(found["overall"], expected(llama, TASKS, names))
    assert 0.25 < found["overall"]["unanimous"] < 0.5, "of three random signs a quarter agree, of two a half"
    assert found["overall"]["changed"] > 0.9


def test_an_expert_that_left_a_tensor_alone(found: dict[str, Any], llama: dict[str, Path]) -> None:
    names = sorted(pico.read(llama["base"]))
    position = next(i for i in range(len(names)) if pico.is_unchanged(0, i))
    part = found["tensors"][names[position]]
    assert part["norm"]["one"] == 0
    assert part["cosine"][0] == [0, 0, 0]
    assert part["sign_agreement"][0] == [0, 0, 0]
    assert part["cosine"][1][1] == pytest.approx(1)


def test_threads_change_nothing(found: dict[str, Any], llama: dict[str, Path]) -> None:
    for threads in (1, 2):
        assert look(recipe(llama, "two", "one", "three"), threads) == found


def test_pieces_of_a_large_tensor_add_up(tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(0)
    base = torch.randn(300_001, generator=noise)
    folders = {"base": base, "a": base + 0.5, "b": torch.where(torch.arange(300_001) < 100_000, base - 2, base)}
    for name, values in folders.items():
        (tmp_path / name).mkdir()
        save_file({"w": values}, tmp_path / name / "model.safetensors")
    paths = {name: tmp_path / name for name in folders}
    part = look(recipe(paths, "a", "b"), 2)["tensors"]["w"]
    close(part, expected(paths, ["a", "b"], ["w"]))
    assert part["sign_agreement"][0][1] == 0
    assert part["unanimous"] == pytest.approx(200_001 / 300_001)


def test_an_adapter_counts_as_what_it_changes(tmp_path: Path) -> None:
    base = pico.make_llama(tmp_path / "base")
    adapter = pico.lora_adapter(tmp_path / "a", base)
    data = {"merge_method": "task_arithmetic", "base_model": str(base), "models": [{"model": str(adapter)}]}
    found = look(data)
    plait.merge(data, tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    assert set(found["tensors"]) == {n for n in before if not torch.equal(before[n], after[n])}
    for name, part in found["tensors"].items():
        norm = float((after[name].double() - before[name].double()).norm())
        assert part["norm"]["a"] == pytest.approx(norm, rel=1e-4), name


def test_without_a_base_there_are_no_task_vectors(llama: dict[str, Path]) -> None:
    data = {"merge_method": "linear", "models": [{"model": str(llama["one"])}, {"model": str(llama["two"])}]}
    with pytest.raises(RecipeError, match="needs a base"):
        look(data)
    everything = {**recipe(llama, "one"), "keep": {"base": ["."]}}
    with pytest.raises(RecipeError, match="nothing to compare"):
        look(everything)


def test_a_recipe_by_a_method_without_base_is_inspected_too(llama: dict[str, Path], found: dict[str, Any]) -> None:
    assert look(recipe(llama, *TASKS, method="linear")) == found
