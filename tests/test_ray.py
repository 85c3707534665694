"""Merges on a Ray cluster: the same bytes as local ones, whoever dies on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import mini_suite
import pico
import pytest
import torch
import yaml
from mini_suite import MiniSuite
from safetensors.torch import load_file, save_file

import plait
from plait.errors import CheckpointError, MachineError, RecipeError
from plait.evaluate.contenders import by_method

try:
    import ray  # pyright: ignore[reportMissingImports]
except ImportError:
    ray: Any = None

mini = mini_suite.mini
needs_ray = pytest.mark.skipif(ray is None, reason="Ray is not installed: `make ray` installs it and runs these tests")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two nodes with a worker each, both on this machine; what runs on the second counts as another machine's."""
    from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    here = str(Path(__file__).parent)
    paths = os.pathsep.join([str(Path(plait.__file__).parent.parent), here, os.environ.get("PYTHONPATH", "")])
    node = {"num_cpus": 1, "object_store_memory": 1 << 27, "include_dashboard": False}
    both = Cluster(initialize_head=True, head_node_args=node)
    both.add_node(num_cpus=1, object_store_memory=1 << 27)
    ray.init(
        address=both.address, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
    )  # fmt: skip
    yield
    ray.shutdown()
    both.shutdown()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = pico.make_llama(root / "base")
    pico.experts(root, base, 3)
    return root


def recipe(models: Path, method: str, **settings: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(models / "base"),
        "models": [{"model": str(models / f"expert{k}")} for k in range(3)],
        **settings,
    }


MERGES = {
    "linear": {},
    "ties": {"parameters": {"density": 0.3, "trim": "model"}},  # three passes over the model first
    "awd": {"parameters": {"steps": 3, "optimizer": "adam"}},  # a survey that remembers
    "dare_ties": {"parameters": {"density": 0.5}, "seed": 3},
    "tsv_m": {"out_dtype": "bfloat16"},
}


@needs_ray
@pytest.mark.parametrize("method", MERGES)
def test_the_same_bytes_as_on_one_machine(
    cluster: None, models: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plait.engine_ray._LEAST_BYTES", 1000)  # many tasks of a pico model
    made = recipe(models, method, **MERGES[method])
    local = plait.merge(made, tmp_path / "local")
    far = plait.merge(made, tmp_path / "far", engine="ray")
    assert far.hashes == local.hashes
    assert (far.path / "plait.json").read_bytes() == (local.path / "plait.json").read_bytes()


@needs_ray
def test_a_cluster_of_its_own_beside_another(cluster: None, models: Path, tmp_path: Path) -> None:
    local = plait.merge(recipe(models, "linear"), tmp_path / "local")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(models, "linear")))
    command = [
        sys.executable,
        "-m",
        "plait",
        "merge",
        "recipe.yaml",
        "far",
        "--engine",
        "ray",
        "--threads",
        "1",
        "--quiet",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = {file.name: sha256(file.read_bytes()).hexdigest() for file in (tmp_path / "far").glob("*.safetensors")}
    assert found == {name: local.hashes[name] for name in found}
    assert found


@needs_ray
def test_a_learned_state_is_applied_by_every_worker(cluster: None, mini: MiniSuite, tmp_path: Path) -> None:
    made = by_method("concrete_adamerging", mini.suite, {"steps": 4, "batch": 4}).model_dump(exclude_defaults=True)
    made["data"] = str(mini.root / "suite.yaml")
    plait.fit(made, tmp_path / "state")
    local = plait.merge(made, tmp_path / "local", state=tmp_path / "state")
    far = plait.merge(made, tmp_path / "far", state=tmp_path / "state", engine="ray")
    assert far.hashes == local.hashes


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A merge of some seconds."""
    root = tmp_path_factory.mktemp("slow")
    for k, name in enumerate(("base", "a", "b")):
        (root / name).mkdir()
        noise = torch.Generator().manual_seed(k)
        tensors = {f"layers.{i}.weight": torch.randn(1000, 1000, generator=noise) for i in range(12)}
        save_file(tensors, root / name / "model.safetensors")
    models = [{"model": str(root / name)} for name in "ab"]
    return {"merge_method": "della", "base_model": str(root / "base"), "models": models, "parameters": {"density": 0.5}}


def workers() -> list[int]:
    """Processes below this one that run a task of a merge now: Ray gives them its name."""
    parents, named = {}, set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if (entry / "cmdline").read_bytes().startswith(b"ray::_merge_group"):
                named.add(int(entry.name))
        except (OSError, ValueError):
            continue  # it has ended

    def is_ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and parents[pid] > 1 and is_ours(parents[pid]))

    return [pid for pid in named if is_ours(pid)]


def finished(folder: Path) -> int:
    """Tensors in the journal of the merge that is going on in this folder."""
    return sum(line.startswith('"') for path in folder.glob(".*/.journal") for line in path.read_text().splitlines())


@needs_ray
def test_workers_that_are_killed_cost_nothing_but_time(
    cluster: None, slow: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plait.engine_ray._LEAST_BYTES", 1000)
    far: list[plait.Merged] = []
    run = threading.Thread(target=lambda: far.append(plait.merge(slow, tmp_path / "far", engine="ray")))
    run.start()
    killed = 0
    deadline = time.monotonic() + 120
    while run.is_alive() and time.monotonic() < deadline and killed < 3:
        if finished(tmp_path) > killed and (found := workers()):
            os.kill(found[0], signal.SIGKILL)
            killed += 1
        time.sleep(0.02)
    run.join(180)
    assert killed == 3
    assert far[0].hashes == plait.merge(slow, tmp_path / "local").hashes


@needs_ray
def test_what_a_worker_finds_is_told_as_on_one_machine(cluster: None, models: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    tensors = load_file(models / "expert0" / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    (broken / "config.json").write_text((models / "base" / "config.json").read_text())
    made = recipe(models, "linear")
    made["models"][0] = {"model": str(broken)}
    said = []
    for engine in ("local", "ray"):
        with pytest.raises(CheckpointError, match=r"'model.norm.weight' holds NaN at \[3\]") as caught:
            plait.merge(made, tmp_path / "out", engine=engine)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert not (tmp_path / "out").exists()


@needs_ray
def test_a_worker_that_sees_other_files_is_refused(
    cluster: None, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plait.engine_ray.plan_key", lambda plan: "another")  # here, not in the workers
    with pytest.raises(MachineError, match="has another version of Plait, or other files"):
        plait.merge(recipe(models, "linear", seed=9), tmp_path / "out", engine="ray")


@needs_ray
def test_what_a_cluster_cannot_do_is_refused(models: Path, tmp_path: Path) -> None:
    for made, device, message in [
        (recipe(models, "twin"), "cpu", "makes a routed model, which one machine writes"),
        (recipe(models, "linear"), "meta", "works on processors, not on meta"),
    ]:
        with pytest.raises(RecipeError, match=message):
            plait.merge(made, tmp_path / "out", engine="ray", device=device)


@needs_ray
def test_a_survey_too_large_to_send_is_refused(
    cluster: None, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plait.engine_ray._STATE_LIMIT", 10_000)
    with pytest.raises(RecipeError, match=r"awd keeps \d+ KB of its survey in memory"):
        plait.merge(recipe(models, "awd", **MERGES["awd"]), tmp_path / "out", engine="ray")


def test_without_ray_a_sentence_says_what_to_install(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MachineError, match=r"Ray is not installed; pip install 'plait\[ray\]'"):
        plait.merge(recipe(models, "linear"), tmp_path / "out", engine="ray")
    assert not list(tmp_path.iterdir()), "nothing was begun"
    with pytest.raises(RecipeError, match="--engine rays: must be local or ray"):
        plait.merge(recipe(models, "linear"), tmp_path / "out", engine="rays")
    with pytest.raises(RecipeError, match="--address: goes with --engine ray"):
        plait.merge(recipe(models, "linear"), tmp_path / "out", address="auto")


def test_groups_are_of_like_bytes_and_hold_every_tensor_once(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.engine_ray import grouped

    tensors = plait.make_plan(plait.load_recipe(recipe(models, "linear"))).tensors
    assert grouped(tensors, 100) == [tensors], "less than the least is one task"
    monkeypatch.setattr("plait.engine_ray._LEAST_BYTES", 1)
    groups = grouped(tensors, 4)
    assert sorted(t.name for group in groups for t in group) == sorted(t.name for t in tensors)
    sizes = [sum(t.bytes_in for t in group) for group in groups]
    assert sizes == sorted(sizes, reverse=True)
    share = sum(sizes) / 4
    assert all(size <= share or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
    assert 4 <= len(groups) <= 9
    assert grouped([], 4) == []
