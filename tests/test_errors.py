"""What people see when their files do not fit: a sentence with file, tensor and next step; the exit code."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file

import plait
from plait.errors import CheckpointError, MachineError

Break = Callable[[Path], None]


def edit(change: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    """Change an expert's tensors in place."""

    def apply(expert: Path) -> None:
        tensors = load_file(expert / "model.safetensors")
        change(tensors)
        save_file(tensors, expert / "model.safetensors", metadata={"format": "pt"})

    return apply


def truncate(expert: Path) -> None:
    path = expert / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)


def climb(expert: Path) -> None:
    names = load_file(expert / "model.safetensors")
    (expert / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, "../base/model.safetensors")}
    (expert / "model.safetensors.index.json").write_text(json.dumps(index))


def grow_vocabulary(expert: Path) -> None:
    def grow(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], tensors[name][:3]])

    edit(grow)(expert)
    config = json.loads((expert / "config.json").read_text())
    config["vocab_size"] += 3
    (expert / "config.json").write_text(json.dumps(config))


CASES: dict[str, tuple[Break, str]] = {
    "missing tensor": (
        edit(lambda t: t.pop("model.norm.weight")),
        r"expert1: tensor 'model\.norm\.weight' is missing, though expert0 has it; add keep: \{base: ",
    ),
    "shape mismatch": (
        edit(lambda t: t.update({"model.norm.weight": torch.zeros(33)})),
        r"expert1: 'model\.norm\.weight' is \[33\], but \[32\] in .*keep: \{per_task: ",
    ),
    "another vocabulary": (grow_vocabulary, r"expert1: .*\[99, 32\], but \[96, 32\].*tokenizer_source: base"),
    "truncated file": (truncate, r"expert1.*model\.safetensors.*1,?000 bytes"),
    "NaN": (
        edit(lambda t: t["model.layers.1.mlp.up_proj.weight"][2].fill_(float("nan"))),
        r"expert1: tensor 'model\.layers\.1\.mlp\.up_proj\.weight' holds NaN at \[2, 0\]",
    ),
    "infinity": (edit(lambda t: t["lm_head.weight"][5, 1:2].fill_(float("inf"))), r"holds an infinity at \[5, 1\]"),
    "path that climbs": (climb, r"expert1/model\.safetensors\.index\.json.*\.\./base"),
    "integers where weights were": (
        edit(lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int64)})),
        r"model\.norm\.weight",
    ),
    "another model": (
        edit(lambda t: [t.pop(name) for name in list(t)] and t.update({"x.y": torch.zeros(3)})),
        r"expert1: none of its 1 tensor names matches",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_files_that_do_not_fit_are_named(case: str, tmp_path: Path) -> None:
    base = pico.make_llama(tmp_path / "base")
    experts = pico.experts(tmp_path, base, 2)
    damage, message = CASES[case]
    damage(experts[1])
    data = {"merge_method": "ties", "base_model": str(base), "models": [{"model": str(e)} for e in experts]}
    with pytest.raises(CheckpointError, match=message):
        plait.merge(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quantised_checkpoints_are_refused(tmp_path: Path) -> None:
    base = pico.make_llama(tmp_path / "base")
    (one,) = pico.experts(tmp_path, base, 1)
    config = json.loads((one / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (one / "config.json").write_text(json.dumps(config))
    data = {"merge_method": "ties", "base_model": str(base), "models": [{"model": str(one)}]}
    with pytest.raises(CheckpointError, match=r"expert0: config\.json says that it is quantised \(gptq\)"):
        plait.make_plan(plait.load_recipe(data))


def test_two_ways_to_align_names_are_refused(tmp_path: Path) -> None:
    base = {"encoder.a.weight": torch.ones(3), "encoder.b.weight": torch.ones(3)}
    twice = {f"{side}.{name}": values.clone() for side in ("question", "passage") for name, values in base.items()}
    for folder, tensors in (("base", base), ("twin", twice)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    data = {
        "merge_method": "linear",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "twin")}],
    }
    with pytest.raises(CheckpointError, match="in two ways"):
        plait.make_plan(plait.load_recipe(data))


def test_counters_differ_without_harm_and_other_integers_do_not(tmp_path: Path) -> None:
    for k, folder in enumerate(["base", "a", "b"]):
        (tmp_path / folder).mkdir()
        tensors = {
            "bn.weight": torch.full((3,), float(k)),
            "bn.running_mean": torch.full((3,), float(k)),
            "bn.num_batches_tracked": torch.tensor(k),
            "position_ids": torch.arange(4),
        }
        save_file(tensors, tmp_path / folder / "model.safetensors")
    data = {
        "merge_method": "linear",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / k)} for k in "ab"],
    }
    got = load_file(plait.merge(data, tmp_path / "out").path / "model.safetensors")
    assert got["bn.running_mean"].tolist() == [1.5] * 3
    assert int(got["bn.num_batches_tracked"]) == 0
    edit(lambda t: t.update({"position_ids": torch.arange(4) + 1}))(tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"b: 'position_ids' \(I64\) differs"):
        plait.merge(data, tmp_path / "out2")


@pytest.fixture
def pair(llama: dict[str, Path]) -> dict[str, object]:
    return {"merge_method": "linear", "models": [{"model": str(llama["one"])}, {"model": str(llama["two"])}]}


def test_a_disk_that_is_too_full_is_found_before_the_work(
    pair: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(MachineError, match=r"too full.*free some space"):
        plait.merge(pair, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_becomes_full_leaves_work_to_go_on_with(
    pair: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.pwrite, []

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(MachineError, match=r"became full.*same command"):
        plait.merge(pair, tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert plait.merge(pair, tmp_path / "out").resumed == 10


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((4,), 60000.0)}, tmp_path / name / "model.safetensors")
    data = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / k)} for k in "ab"],
        "parameters": {"normalize": False},
        "out_dtype": "float16",
    }
    with pytest.raises(MachineError, match="'w': merged values exceed float16"):
        plait.merge(data, tmp_path / "out")


def test_models_that_differ_need_a_base_to_say_whose_config_counts(tmp_path: Path) -> None:
    folders = [pico.make_llama(tmp_path / name) for name in ("a", "b")]
    config = json.loads((folders[1] / "config.json").read_text())
    config["rms_norm_eps"] = 0.1
    (folders[1] / "config.json").write_text(json.dumps(config))
    with pytest.raises(plait.RecipeError, match=r"rms_norm_eps.*name a base_model"):
        plait.merge({"merge_method": "linear", "models": [{"model": str(f)} for f in folders]}, tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["merge", "nowhere.yaml", "out"], 2, "no such recipe file"),
        (["merge", "--method", "ties", "--expert", "{one}", "out"], 2, "add base_model"),
        (["merge", "--method", "linear", "--expert", "{one}x", "out"], 3, "did you mean"),
        (["merge", "--method", "linear", "--expert", "{one}", "-s", "weight=a", "out"], 2, "must be a number"),
        (["merge", "--method", "linear", "--expert", "{one}", "--memory", "lots", "out"], 2, "512MB"),
        (["merge", "--method", "linear", "--expert", "{one}", "--device", "cuda", "out"], 1, "CUDA"),
        (["methods", "tie"], 2, "did you mean 'ties'"),
        (["mrege"], 2, "No such command"),
    ],
)
def test_exit_codes(words: list[str], code: int, message: str, llama: dict[str, Path], tmp_path: Path) -> None:
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    run = subprocess.run(
        [sys.executable, "-m", "plait", *(w.format(**llama) for w in words)],
        cwd=tmp_path, text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == code, run.stderr
    assert message in run.stderr
    assert "Traceback" not in run.stderr
