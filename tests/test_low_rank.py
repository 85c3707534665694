"""Adapters in the compiled loops: the same bytes as torch, whatever they sit on and however they are stored."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import compiled
import pytest
import torch
from safetensors.torch import load_file, save_file

import plait
from plait.errors import CheckpointError
from plait.kernels import native
from plait.kernels.worker import Worker
from plait.methods.contract import get_method

loops = compiled.loops

SHAPES = {
    "deep.a.weight": (300, 1031), "deep.b.weight": (64, 65), "wide.weight": (3, 90_001), "turned.weight": (700, 101),
    "norm.weight": (77,),
}  # fmt: skip
CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}), ("average", {}), ("task_arithmetic", {"weight": 0.37}), ("ties", {"density": 0.2}),
    ("ties", {"density": 0.2, "trim": "model"}), ("dare_ties", {"density": 0.3}), ("breadcrumbs", {"density": 0.9}),
    ("della", {"density": 0.5, "epsilon": 0.15}), ("sce", {"select_topk": 0.1}), ("consensus", {}),
]  # fmt: skip


def base(folder: Path, dtype: torch.dtype, seed: int) -> Path:
    noise = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=noise).mul(0.02).to(dtype) for name, shape in SHAPES.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "x"}')
    return folder


def adapter(folder: Path, rank: int, dtype: torch.dtype, skip: str = "") -> Path:
    """`turned` is stored the other way round, as a Conv1D is: its factors say so."""
    noise, tensors = torch.Generator().manual_seed(rank), {}
    for name, shape in SHAPES.items():
        if len(shape) == 2 and name != skip:
            rows, columns = reversed(shape) if name == "turned.weight" else shape
            stem = "base_model.model." + name.removesuffix("weight")
            for key, size in (("A", (rank, columns)), ("B", (rows, rank))):
                tensors[f"{stem}lora_{key}.weight"] = torch.randn(size, generator=noise).mul(0.05).to(dtype)
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none", "fan_in_fan_out": False,
        "target_modules": ["a", "b", "wide", "turned"], "base_model_name_or_path": "base",
    }  # fmt: skip
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    base(root / "base", torch.bfloat16, 0)
    base(root / "other", torch.float16, 1)
    adapter(root / "one", 1, torch.bfloat16)
    adapter(root / "three", 3, torch.float16, "deep.b.weight")
    adapter(root / "six", 6, torch.float32)
    adapter(root / "many", 17, torch.bfloat16)
    return root


def digest(folder: Path) -> dict[str, bytes]:
    return {name: value.view(torch.uint8).numpy().tobytes() for name, value in load_file(folder).items()}


def both(asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, Counter[str]]:
    """What the loops write, what torch writes, and how often the loops were asked."""
    used, merge, product = Counter[str](), Worker.merge, Worker.product

    def counted(self: Worker, *given: Any) -> memoryview:
        used["merge"] += 1
        return merge(self, *given)

    def multiplied(self: Worker, *given: Any) -> None:
        used["product"] += 1
        product(self, *given)

    monkeypatch.setattr(Worker, "merge", counted)
    monkeypatch.setattr(Worker, "product", multiplied)
    plait.merge(asked, tmp_path / "fast", threads=2)
    before = Counter(used)
    monkeypatch.setenv(native.OFF, "0")
    plait.merge(asked, tmp_path / "slow", threads=1)
    assert used == before
    fast, slow = (digest(tmp_path / name / "model.safetensors") for name in ("fast", "slow"))
    return fast, slow, used


@pytest.mark.parametrize("on", ["base", "mixed"])
@pytest.mark.parametrize(("method", "parameters"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_the_same_bytes_with_and_without(
    method: str, parameters: dict[str, Any], on: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mixed: an adapter on another model than the base, two on the base, and a whole model."""
    names = [place / name for name in ("one", "three", "six", "many")]
    spelt = [f"{place / 'base'}+{name}" for name in names]
    if on == "mixed":
        spelt = [f"{place / 'other'}+{names[0]}", *spelt[1:3], str(place / "other")]
    asked: dict[str, Any] = {
        "merge_method": method, "models": [{"model": model} for model in spelt], "parameters": parameters,
    }  # fmt: skip
    if get_method(method).base != "unused":
        asked["base_model"] = str(place / "base")
    fast, slow, used = both(asked, tmp_path, monkeypatch)
    assert used["merge"] >= 4
    assert used["product"] >= 12
    assert fast == slow


def test_it_is_the_update_that_is_added(place: Path, tmp_path: Path) -> None:
    """Against float64: scale·B·A on the base, in both ways of storing a weight."""
    model = f"{place / 'base'}+{place / 'many'}"
    plait.merge({"merge_method": "linear", "models": [{"model": model}], "out_dtype": "float32"}, tmp_path / "out")
    found, under = load_file(tmp_path / "out" / "model.safetensors"), load_file(place / "base" / "model.safetensors")
    factors = load_file(place / "many" / "adapter_model.safetensors")
    for name, shape in SHAPES.items():
        want = under[name].double()
        if len(shape) == 2:
            stem = "base_model.model." + name.removesuffix("weight")
            update = 2 * factors[f"{stem}lora_B.weight"].double() @ factors[f"{stem}lora_A.weight"].double()
            want = want + (update.T if name == "turned.weight" else update)
        assert torch.allclose(found[name].double(), want, rtol=0, atol=2e-6), name


def test_a_factor_that_is_not_finite_is_named(place: Path, tmp_path: Path) -> None:
    broken = adapter(tmp_path / "broken", 2, torch.float32)
    tensors = load_file(broken / "adapter_model.safetensors")
    tensors["base_model.model.deep.a.lora_A.weight"][1, 7] = float("inf")
    save_file(tensors, broken / "adapter_model.safetensors")
    asked = {"merge_method": "task_arithmetic", "base_model": str(place / "base"), "models": [{"model": str(broken)}]}
    with pytest.raises(CheckpointError, match=r"deep\.a\.weight.* holds (NaN|an infinity) at \[\d+, 7\]"):
        plait.merge(asked, tmp_path / "out")
