"""`.bin` checkpoints merge to the bytes that the same tensors give as safetensors; tied tensors stay one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hostile
import pico
import pytest
import torch
import transformers
from safetensors.torch import load_file

import plait
from plait.errors import CheckpointError


def as_bin(source: Path, target: Path, shards: int = 1, extra: dict[str, torch.Tensor] | None = None) -> Path:
    """A safetensors checkpoint as transformers used to write it: pytorch_model.bin, or shards and their index."""
    tensors = {**load_file(source / "model.safetensors"), **(extra or {})}
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    if shards == 1:
        torch.save(tensors, target / "pytorch_model.bin")
        return target
    names = sorted(tensors)
    files = [f"pytorch_model-{k + 1:05d}-of-{shards:05d}.bin" for k in range(shards)]
    for k, file in enumerate(files):
        torch.save({name: tensors[name] for name in names[k::shards]}, target / file)
    where = {name: files[i % shards] for i, name in enumerate(names)}
    hostile.write_index(target, where, "pytorch_model.bin.index.json")
    return target


def recipe(method: str, base: Path, models: dict[str, Path], **parameters: Any) -> dict[str, Any]:
    listed = [{"model": str(path), "name": name} for name, path in models.items()]
    return {"merge_method": method, "base_model": str(base), "models": listed, "parameters": parameters}


def test_a_bin_base_gives_the_bytes_of_a_safetensors_base(tmp_path: Path) -> None:
    base = pico.make_llama(tmp_path / "base", dtype=torch.bfloat16)
    one, two = pico.experts(tmp_path / "e", base, 2)
    bases = {
        "file": as_bin(base, tmp_path / "bin"),
        "shards": as_bin(base, tmp_path / "shards", 3),
    }
    order = list(load_file(base / "model.safetensors"))
    for method, parameters in (("dare_ties", {"density": 0.5}), ("ties", {"density": 0.3, "trim": "model"})):
        want = plait.merge(recipe(method, base, {"a": one, "b": two}, **parameters), tmp_path / f"{method}-want")
        reference = load_file(want.path / "model.safetensors")
        assert sorted(reference) == sorted(order)
        for kind, folder in bases.items():
            made = plait.merge(
                recipe(method, folder, {"a": one, "b": two}, **parameters), tmp_path / f"{method}-{kind}"
            )
            got = load_file(made.path / "model.safetensors")
            assert sorted(got) == sorted(reference)
            for name, values in reference.items():
                assert got[name].dtype == values.dtype
                assert torch.equal(got[name].view(torch.int16), values.view(torch.int16)), name
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ties-shards", output_loading_info=True)
    assert not any(model[1].values()), model[1]


def test_bin_experts_too_give_the_same_file(tmp_path: Path) -> None:
    base = pico.make_llama(tmp_path / "base")
    one, two = pico.experts(tmp_path / "e", base, 2)
    want = plait.merge(recipe("ties", base, {"a": one, "b": two}, density=0.3), tmp_path / "want")
    mixed = {"a": as_bin(one, tmp_path / "one", 2), "b": as_bin(two, tmp_path / "two")}
    made = plait.merge(recipe("ties", base, mixed, density=0.3), tmp_path / "out")
    assert made.hashes == want.hashes, "the base is the same file, so the order of tensors is too"


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    base = pico.make_llama(tmp_path / "base")
    (one,) = pico.experts(tmp_path / "e", base, 1)
    sharded = as_bin(base, tmp_path / "bin", 3)
    (sharded / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00003\.bin"):
        plait.make_plan(plait.load_recipe(recipe("ties", sharded, {"a": one})))


class TestTiedHeadStoredTwice:
    """transformers 4 wrote `lm_head.weight` into .bin files of tied models; safetensors files never have it."""

    @pytest.fixture
    def models(self, tmp_path: Path) -> dict[str, Path]:
        base = pico.make_llama(tmp_path / "base", tied=True)
        one, two = pico.experts(tmp_path / "e", base, 2, scale=0.5, unchanged=False)
        found = {"base": base, "one": one, "two": two}
        for name, folder in list(found.items()):
            word = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
            assert "lm_head.weight" not in load_file(folder / "model.safetensors")
            found[f"{name} twice"] = as_bin(folder, tmp_path / f"{name}2", extra={"lm_head.weight": word.clone()})
        return found

    def test_in_an_expert_it_is_left_out(self, models: dict[str, Path], tmp_path: Path) -> None:
        want = plait.merge(recipe("ties", models["base"], {"a": models["one"], "b": models["two"]}), tmp_path / "want")
        mixed = {"a": models["one twice"], "b": models["two"]}
        made = plait.merge(recipe("ties", models["base"], mixed), tmp_path / "out")
        assert made.hashes == want.hashes
        assert not made.plan.heads
        assert any("second copy of 'model.embed_tokens.weight'" in note for note in made.plan.notes)

    @pytest.mark.parametrize("experts", ["once", "twice", "mixed"])
    @pytest.mark.parametrize(
        ("method", "parameters"),
        [
            ("dare_linear", {"density": 0.5}),
            ("della", {"density": 0.5}),
            ("ties", {"density": 0.3, "trim": "model"}),
            ("slerp", {"t": 0.3}),
            pytest.param("anchor_schedule", {"anchor": "a"}),
            pytest.param("task_arithmetic", {"weight": [{"filter": "embed", "value": 0.5}, {"value": 1}]}),
        ],
        ids=lambda v: v if isinstance(v, str) else "",
    )
    def test_in_the_base_both_copies_come_out_equal(
        self, method: str, parameters: dict[str, Any], experts: str, models: dict[str, Path], tmp_path: Path
    ) -> None:
        first = models["one" if experts == "once" else "one twice"]
        second = models["two twice" if experts == "twice" else "two"]
        listed = {"a": first} if method == "slerp" else {"a": first, "b": second}
        made = plait.merge(recipe(method, models["base twice"], listed, **parameters), tmp_path / "out")
        got = load_file(made.path / "model.safetensors")
        base = load_file(models["base"] / "model.safetensors")
        assert not torch.equal(got["lm_head.weight"], base["model.embed_tokens.weight"])
        assert torch.equal(got["lm_head.weight"], got["model.embed_tokens.weight"])

    def test_ties_that_the_config_does_not_tell(self, models: dict[str, Path], tmp_path: Path) -> None:
        """GPT-2, BERT and others tie by default, and their config.json says nothing."""
        path = models["base twice"] / "config.json"
        config = json.loads(path.read_text())
        del config["tie_word_embeddings"]
        path.write_text(json.dumps(config))
        listed = {"a": models["one twice"], "b": models["two twice"]}
        made = plait.merge(recipe("dare_linear", models["base twice"], listed, density=0.5), tmp_path / "out")
        got = load_file(made.path / "model.safetensors")
        assert torch.equal(got["lm_head.weight"], got["model.embed_tokens.weight"])
