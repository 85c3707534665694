"""The whole way, recipe to folder: right values, the same bytes always, whole or not at all."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import reference as ref
import torch
import transformers
from conftest import folder_hash
from safetensors.torch import load_file, save_file

import plait
from plait.errors import CheckpointError, MachineError, RecipeError
from plait.methods.stream import GRAIN

METHODS: dict[str, tuple[int, dict[str, Any], Callable[..., Any]]] = {
    "linear": (3, {"weight": 0.5}, lambda b, m: ref.linear(None, m)),
    "task_arithmetic": (3, {"weight": 0.3}, lambda b, m: ref.task_arithmetic(b, m, [0.3] * 3)),
    "ties": (3, {"density": 0.3}, lambda b, m: ref.ties(b, m, density=0.3)),
    "breadcrumbs": (3, {"density": 0.8, "gamma": 0.05}, lambda b, m: ref.breadcrumbs(b, m, None, 0.8, 0.05)),
    "breadcrumbs_ties": (3, {"density": 0.8}, lambda b, m: ref.breadcrumbs_ties(b, m, None, 0.8)),
    "sce": (3, {}, lambda b, m: ref.sce(b, m)),
    "slerp": (1, {"t": 0.3}, lambda b, m: ref.slerp(b, m, 0.3)),
    "nuslerp": (2, {"weight": 1}, lambda b, m: ref.nuslerp(b, m, [1, 1])),
    "multislerp": (3, {"weight": 1}, lambda b, m: ref.multislerp(b, m)),
    "karcher": (3, {}, lambda b, m: ref.karcher(None, m)),
    "model_stock": (3, {}, lambda b, m: ref.model_stock(b, m)),
    "nearswap": (1, {"t": 0.001}, lambda b, m: ref.nearswap(b, m, 0.001)),
    "passthrough": (1, {"scale": 1.5}, lambda b, m: ref.passthrough(None, m, 1.5)),
}
ARCHITECTURES = {
    "llama": (pico.make_llama, transformers.AutoModelForCausalLM),
    "bert": (pico.make_bert, transformers.AutoModel),
    "vit": (pico.make_vit, transformers.AutoModel),
    "t5": (pico.make_t5, transformers.AutoModelForSeq2SeqLM),
}


def recipe(
    method: str, base: Path | None, models: list[Path], parameters: dict[str, Any] | None = None, **more: Any
) -> dict:
    found: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(m), "name": m.name} for m in models],
        "parameters": parameters or {},
        **more,
    }
    return {**found, "base_model": str(base)} if base is not None else found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_agree_with_the_reference_on_real_checkpoints(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    make, auto = ARCHITECTURES[architecture]
    base = make(tmp_path / "base", dtype=dtype)
    models = pico.experts(tmp_path / "experts", base, 3, scale=0.25)
    tensors = [pico.read(folder) for folder in (base, *models)]
    for method, (count, parameters, expected) in METHODS.items():
        base_model = None if method in ("linear", "karcher", "passthrough") else base
        made = plait.merge(
            recipe(method, base_model, models[:count], parameters, out_dtype="float32"), tmp_path / method
        )
        got = load_file(made.path / "model.safetensors")
        assert got.keys() == tensors[0].keys()
        for name, values in got.items():
            if not values.is_floating_point():
                assert torch.equal(values, tensors[0][name])
                continue
            first, *rest = (t[name].double().numpy() for t in tensors[: count + 1])
            want = expected(first, rest)
            error = np.abs(values.double().numpy() - want).max() / max(np.abs(want).max(), 1e-12)
            assert error <= 1e-6, (method, name, error)
    _, info = auto.from_pretrained(tmp_path / "ties", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info


def test_bf16_output_is_the_float32_result_rounded_once(tmp_path: Path) -> None:
    base = pico.make_llama(tmp_path / "base", dtype=torch.bfloat16)
    models = pico.experts(tmp_path / "experts", base, 3)
    exact = plait.merge(recipe("ties", base, models, {"density": 0.5}, out_dtype="float32"), tmp_path / "f32")
    plain = plait.merge(recipe("ties", base, models, {"density": 0.5}), tmp_path / "bf16")
    wide, narrow = (load_file(made.path / "model.safetensors") for made in (exact, plain))
    for name, values in narrow.items():
        assert values.dtype == torch.bfloat16
        assert torch.equal(values, wide[name].bfloat16())
    assert json.loads((plain.path / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((exact.path / "config.json").read_text())["dtype"] == "float32"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tensors of several pieces, of odd sizes, in three types."""
    root = tmp_path_factory.mktemp("large")
    shapes = {f"layers.{i}.{kind}": shape for i in range(6) for kind, shape in SHAPES.items()}
    folders = {}
    for k, name in enumerate(["base", "a", "b", "c"]):
        noise = torch.Generator().manual_seed(k)
        start = torch.Generator().manual_seed(99)
        tensors = {}
        for tensor, shape in shapes.items():
            values = torch.randn(shape, generator=start) + 0.05 * k * torch.randn(shape, generator=noise)
            dtype = {"weight": torch.float32, "half": torch.bfloat16}.get(tensor.rsplit(".", 1)[1], torch.float16)
            tensors[tensor] = values.to(dtype)
        folders[name] = root / name
        folders[name].mkdir()
        save_file(tensors, folders[name] / "model.safetensors")
        (folders[name] / "config.json").write_text('{"model_type": "none", "num_hidden_layers": 6}')
    return folders


SHAPES = {"weight": (GRAIN // 300, 707), "half": (3, GRAIN // 5 + 1), "bias": (513,)}
ANY_ORDER = [
    ("ties", {"density": 0.2, "trim": "model"}),
    ("ties", {"density": 0.37}),
    ("dare_ties", {"density": 0.3}),
    ("della", {"density": 0.4}),
    ("breadcrumbs", {"density": 0.6}),
    ("sce", {"select_topk": 0.2}),
    ("karcher", {}),
    ("model_stock", {"filter_wise": True}),
    ("consensus", {"weight": 0.3}),
]


@pytest.mark.parametrize(("method", "parameters"), ANY_ORDER, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_same_bytes_whatever_the_threads_memory_and_order(
    method: str, parameters: dict[str, Any], large: dict[str, Path], tmp_path: Path
) -> None:
    base = None if method == "karcher" else large["base"]
    models = [large[k] for k in "abc"]
    found = set()
    for i, (threads, memory, order) in enumerate([(1, "64MB", models), (2, "4GB", models[::-1]), (3, "64MB", models)]):
        out = tmp_path / str(i)
        plait.merge(recipe(method, base, order, parameters), out, threads=threads, memory=memory)
        found.add(folder_hash(out))
    assert len(found) == 1


def cli(*words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "plait", *words],
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_same_bytes_whatever_the_hash_seed(large: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe("dare_ties", large["base"], [large[k] for k in "abc"], {"density": 0.5})))
    runs = [cli("merge", str(path), str(tmp_path / seed), PYTHONHASHSEED=seed) for seed in ("0", "1", "12345")]
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    assert len({folder_hash(tmp_path / seed) for seed in ("0", "1", "12345")}) == 1


def test_killed_runs_resume_to_the_same_bytes(large: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe("della", large["base"], [large[k] for k in "abc"], {"density": 0.5})))
    plait.merge(path, tmp_path / "whole")
    out = tmp_path / "killed"
    chance = random.Random(5)
    kept = kills = 0
    while kills < 3:
        run = cli("merge", str(path), str(out), "--threads", "1")
        goal = kept + chance.randint(1, 3)
        while run.poll() is None:
            lines = sum(len(j.read_text().splitlines()) - 1 for j in tmp_path.glob(".killed.partial-*/.journal"))
            if lines >= goal:
                break
        run.send_signal(signal.SIGKILL)
        _, errors = run.communicate(timeout=120)
        if run.returncode == 0:
            break  # it was faster than the signal
        assert run.returncode == -signal.SIGKILL, errors
        assert not out.exists()
        (journal,) = tmp_path.glob(".killed.partial-*/.journal")
        kept = len(journal.read_text().splitlines()) - 1
        assert kept >= goal
        kills += 1
    assert kills >= 1
    if kills == 3:
        assert plait.merge(path, out).resumed == kept
    assert folder_hash(out) == folder_hash(tmp_path / "whole")
    assert not list(tmp_path.glob(".killed*"))


def test_a_torn_journal_line_is_not_believed(large: dict[str, Path], tmp_path: Path) -> None:
    data = recipe("ties", large["base"], [large["a"], large["b"]], {"density": 0.5})
    whole = plait.merge(data, tmp_path / "whole")
    broken = dict(data, models=[*data["models"], {"model": str(tmp_path / "nan"), "name": "c"}])
    shutil.copytree(large["c"], tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["layers.5.bias"][3] = float("nan")
    save_file(tensors, tmp_path / "nan" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.5\.bias.*NaN at \[3\]"):
        plait.merge(broken, tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()
    (journal,) = tmp_path.glob(".out.partial-*/.journal")
    journal.write_text(journal.read_text() + '"layers.5.wei')
    save_file(
        {**tensors, "layers.5.bias": torch.zeros_like(tensors["layers.5.bias"])}, tmp_path / "nan/model.safetensors"
    )
    again = plait.merge(broken, tmp_path / "out")
    assert again.resumed == 0, "the expert's file has changed, so nothing of the first run may be used"
    assert whole.hashes != again.hashes


def test_an_existing_folder_is_only_replaced_when_told(llama: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    data = recipe("linear", None, [llama["one"], llama["two"]])
    with pytest.raises(RecipeError, match=r"exists already.*--overwrite"):
        plait.merge(data, out)
    assert (out / "mine.txt").read_text() == "precious"
    plait.merge(data, out, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert (out / "model.safetensors").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("inside", [False, True])
def test_output_must_not_be_an_input(inside: bool, tmp_path: Path) -> None:
    base = pico.make_llama(tmp_path / "all" / "base")
    (one,) = pico.experts(tmp_path / "all", base, 1)
    out = tmp_path / "all" if inside else one
    with pytest.raises(RecipeError, match="input"):
        plait.merge(recipe("linear", None, [base, one]), out, overwrite=True)
    assert (one / "model.safetensors").exists()


def test_two_runs_do_not_write_one_folder(llama: dict[str, Path], tmp_path: Path) -> None:
    import fcntl

    data = recipe("linear", None, [llama["one"], llama["two"]])
    with pytest.raises(CheckpointError):
        plait.merge(recipe("linear", None, [llama["one"], tmp_path / "missing"]), tmp_path / "out")
    plait.merge(data, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    from plait.plan import make_plan
    from plait.recipe import load_recipe
    from plait.run import _resume_key
    from plait.shards import lay_out
    from plait.writer import FolderWriter

    plan = make_plan(load_recipe(data))
    shards = lay_out([t.spec for t in plan.tensors], 5 * 10**9, {"format": "pt"})
    with FolderWriter(tmp_path / "out", _resume_key(plan, shards), shards, overwrite=False) as writer:
        held = os.open(writer.partial, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(held)
        with pytest.raises(MachineError, match="another merge"):
            plait.merge(data, tmp_path / "out")


def test_shards_and_their_index_load(llama: dict[str, Path], tmp_path: Path) -> None:
    data = recipe("task_arithmetic", llama["base"], [llama["one"], llama["two"]], {"weight": 0.5})
    one = plait.merge(data, tmp_path / "one")
    many = plait.merge(data, tmp_path / "many", shard_size="20KB")
    files = sorted(p.name for p in many.path.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(many.path, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, values in load_file(one.path / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], values)
    assert transformers.AutoTokenizer.from_pretrained(many.path)("w1 w2")["input_ids"]


def test_adapters_give_what_their_merged_models_give(tmp_path: Path) -> None:
    import peft

    base = pico.make_llama(tmp_path / "base")
    adapters = [
        pico.lora_adapter(tmp_path / "a", base, rank=4, alpha=8, seed=1),
        pico.lora_adapter(tmp_path / "b", base, rank=2, alpha=16, seed=2, rslora=True, targets=("o_proj", "up_proj")),
    ]
    merged = []
    for adapter in adapters:
        model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter)
        model.merge_and_unload().save_pretrained(tmp_path / f"{adapter.name}-full")
        merged.append(tmp_path / f"{adapter.name}-full")
    for method, parameters in [("task_arithmetic", {"weight": 0.7}), ("ties", {"density": 1.0}), ("linear", {})]:
        base_model = None if method == "linear" else base
        spelt = [Path(f"{base}+{a}") for a in adapters] if method == "linear" else adapters
        small = plait.merge(recipe(method, base_model, spelt, parameters), tmp_path / f"{method}-lora")
        whole = plait.merge(recipe(method, base_model, merged, parameters), tmp_path / f"{method}-full")
        got, want = (load_file(made.path / "model.safetensors") for made in (small, whole))
        assert got.keys() == want.keys()
        for name, values in want.items():
            torch.testing.assert_close(got[name], values, rtol=1e-5, atol=1e-6)
    assert {t.reason for t in small.plan.tensors} == {"2 models"}


def test_classifiers_over_a_bare_base_align_and_keep_their_heads(tmp_path: Path) -> None:
    base = pico.make_bert(tmp_path / "base")
    experts = pico.bert_experts(tmp_path / "experts", base, 3)
    made = plait.merge(recipe("ties", base, list(experts), {"density": 0.5}), tmp_path / "out")
    _, info = transformers.AutoModel.from_pretrained(made.path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for expert in experts:
        head = load_file(made.path / "heads" / f"{expert.name}.safetensors")
        stored = pico.read(expert)
        assert head
        assert all(torch.equal(values, stored[name]) for name, values in head.items())


@pytest.mark.parametrize("size", ["below", "enough"])
def test_memory_budget_names_the_least_that_works(size: str, tmp_path: Path) -> None:
    for k, name in enumerate(["base", "a", "b"]):
        (tmp_path / name).mkdir()
        values = torch.randn(1_000_003, generator=torch.Generator().manual_seed(k))
        save_file({"w": values}, tmp_path / name / "model.safetensors")
    data = recipe("della", tmp_path / "base", [tmp_path / "a", tmp_path / "b"], {"density": 0.5})
    with pytest.raises(MachineError, match=r"--memory 57MB") as caught:
        plait.merge(data, tmp_path / "out", memory="20MB")
    if size == "enough":
        plait.merge(data, tmp_path / "out", memory=str(caught.value).rsplit("--memory ", 1)[1].rstrip("."))
        assert (tmp_path / "out").exists()


def test_nothing_but_the_recipe_and_the_inputs_decides_the_side_files(llama: dict[str, Path], tmp_path: Path) -> None:
    made = plait.merge(recipe("linear", llama["base"], [llama["two"], llama["one"]]), tmp_path / "out")
    record = json.loads((made.path / "plait.json").read_text())
    assert record["outputs"] == dict(made.hashes)
    assert record["recipe"]["models"][0]["name"] == "expert0"
    assert set(record["inputs"]) == {str(llama[k]) for k in ("base", "one", "two")}
    assert (made.path / "tokenizer.json").read_bytes() == (llama["base"] / "tokenizer.json").read_bytes()
    assert "linear" in (made.path / "README.md").read_text()


@pytest.mark.parametrize("labels", [["cat", "dog"], ["spam", "ham"]], ids=["same task", "other tasks"])
def test_heads_are_merged_only_where_the_labels_are_the_same(labels: list[str], tmp_path: Path) -> None:
    base = pico.make_bert_classifier(tmp_path / "base")
    folders = pico.experts(tmp_path / "e", base, 2)
    for folder, names in zip(folders, [["cat", "dog"], labels], strict=True):
        config = json.loads((folder / "config.json").read_text())
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        (folder / "config.json").write_text(json.dumps(config))
    made = plait.merge(recipe("task_arithmetic", base, folders, {"weight": 0.5}), tmp_path / "out")
    actions = {t.name: t.action for t in made.plan.tensors if t.name.startswith("classifier")}
    if labels == ["cat", "dog"]:
        assert set(actions.values()) == {"merge"}
        assert any("leaves it to each" in note for note in made.plan.notes)
    else:
        assert set(actions.values()) == {"copy"}
        for folder in folders:
            head = load_file(made.path / "heads" / f"{folder.name}.safetensors")
            assert torch.equal(head["classifier.weight"], pico.read(folder)["classifier.weight"])
    _, info = transformers.AutoModelForSequenceClassification.from_pretrained(made.path, output_loading_info=True)
    assert not info["missing_keys"]
