"""Names of two checkpoints of one model: prefixes, ties, and those that transformers uses in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pico
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import plait
from plait.errors import CheckpointError
from plait.names import Alignment, align, is_tied, tie_candidates
from plait.renames import in_memory_names

BARE = ["embeddings.weight", "encoder.0.weight", "encoder.0.bias", "pooler.weight"]


def wrapped(names: list[str]) -> list[str]:
    return [f"bert.{name}" for name in names]


class TestAlign:
    def test_same_names(self) -> None:
        found = align(BARE, [*reversed(BARE), "head.weight"], "expert", "base")
        assert found == Alignment(names={name: name for name in BARE}, extra=["head.weight"])
        assert list(found.names) == BARE, "in the reference's order"
        assert found.describe() == "4 of 4 names; 1 of its own"

    def test_a_prefix_that_only_the_expert_has(self) -> None:
        stored = [*wrapped(BARE[:3]), "classifier.weight", "classifier.bias"]
        found = align(BARE, stored, "expert", "base")
        assert found.names == {name: f"bert.{name}" for name in BARE[:3]}
        assert (found.stripped, found.added) == ("bert.", "")
        assert found.missing == ["pooler.weight"]
        assert found.extra == ["classifier.weight", "classifier.bias"]
        assert found.describe() == "3 of 4 names, without the prefix 'bert.'; 2 of its own"

    def test_a_prefix_that_only_the_base_has(self) -> None:
        reference = [*wrapped(BARE), "cls.bias"]
        found = align(reference, [*BARE, "head.weight"], "expert", "base")
        assert found.names == {f"bert.{name}": name for name in BARE}
        assert (found.stripped, found.added) == ("", "bert.")
        assert found.missing == ["cls.bias"]
        assert found.extra == ["head.weight"]
        assert found.describe() == "4 of 5 names, with the prefix 'bert.' added; 1 of its own"

    def test_a_prefix_of_two_parts(self) -> None:
        found = align(BARE, [f"model.vision.{name}" for name in BARE], "expert", "base")
        assert found.stripped == "model.vision."
        assert found.names["pooler.weight"] == "model.vision.pooler.weight"
        assert not found.missing

    def test_names_outside_the_prefix_are_not_matched_by_chance(self) -> None:
        """`pooler.weight` of the wrapper is its own; the base's is `bert.pooler.weight`."""
        found = align(BARE, [*wrapped(BARE), "pooler.weight"], "expert", "base")
        assert found.names["pooler.weight"] == "bert.pooler.weight"
        assert found.extra == ["pooler.weight"]

    def test_two_towers_are_refused(self) -> None:
        towers = [f"{tower}.{name}" for tower in ("query", "passage") for name in BARE]
        with pytest.raises(CheckpointError, match=r"two.*match base in two ways .*'passage\.'.*'query\.'") as caught:
            align(BARE, towers, "two", "base")
        assert "checkpoint of its own" in str(caught.value)
        with pytest.raises(CheckpointError, match="in two ways"):
            align(towers, BARE, "one", "base")

    def test_a_second_way_that_hardly_matches_is_no_doubt(self) -> None:
        found = align(BARE, [*BARE, "teacher.pooler.weight"], "expert", "base")
        assert found.names == {name: name for name in BARE}
        assert found.extra == ["teacher.pooler.weight"]

    def test_a_single_name_in_two_ways_is_taken_as_it_is(self) -> None:
        found = align(["weight"], ["weight", "other.weight"], "expert", "base")
        assert found.names == {"weight": "weight"}

    def test_another_model_is_refused(self) -> None:
        with pytest.raises(CheckpointError, match=r"x: none of its 1 tensor names matches base .*'a\.b'.*'embeddings"):
            align(BARE, ["a.b"], "x", "base")
        with pytest.raises(CheckpointError, match="none of its 0 tensor names"):
            align(BARE, [], "x", "base")


@pytest.mark.parametrize(
    ("name", "names", "candidates"),
    [
        ("lm_head.weight", ["model.embed_tokens.weight", "model.norm.weight"], ["model.embed_tokens.weight"]),
        ("lm_head.weight", ["transformer.wte.weight", "transformer.wpe.weight"], ["transformer.wte.weight"]),
        ("lm_head.weight", ["shared.weight", "encoder.block.0.weight"], ["shared.weight"]),
        ("encoder.embed_tokens.weight", ["shared.weight"], ["shared.weight"]),
        ("model.decoder.embed_tokens.weight", ["model.shared.weight"], ["model.shared.weight"]),
        ("shared.weight", ["encoder.embed_tokens.weight"], ["encoder.embed_tokens.weight"]),
        (
            "cls.predictions.decoder.weight",
            ["bert.embeddings.word_embeddings.weight", "bert.embeddings.position_embeddings.weight"],
            ["bert.embeddings.word_embeddings.weight"],
        ),
        ("cls.predictions.decoder.bias", ["cls.predictions.bias"], ["cls.predictions.bias"]),
        (
            "lm_head.decoder.weight",
            ["roberta.embeddings.word_embeddings.weight"],
            ["roberta.embeddings.word_embeddings.weight"],
        ),
        ("lm_head.decoder.bias", ["lm_head.bias"], ["lm_head.bias"]),
        ("my_lm_head.weight", ["model.embed_tokens.weight"], []),
        ("lm_head.weight", ["model.unembed_tokens.weight"], []),
        ("model.norm.weight", ["model.embed_tokens.weight"], []),
    ],
)
def test_tie_candidates(name: str, names: list[str], candidates: list[str]) -> None:
    assert tie_candidates(name, names) == candidates


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"text_config": {"tie_word_embeddings": False}}, False),
        ({"text_config": None}, False),
        ({}, False),
    ],
)
def test_is_tied(config: dict[str, Any], tied: bool) -> None:
    assert is_tied(config) is tied


def rewritten(source: Path, target: Path, change: dict[str, torch.Tensor]) -> Path:
    """A copy of a checkpoint with tensors added or replaced."""
    target.mkdir()
    tensors = {**load_file(source / "model.safetensors"), **change}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


def linear(base: Path, *models: Path) -> dict[str, Any]:
    return {"merge_method": "linear", "base_model": str(base), "models": [{"model": str(m)} for m in models]}


class TestTiedTensors:
    """A tied tensor may be in a file once or several times; the merge has it where the base has it."""

    @pytest.fixture
    def t5(self, tmp_path: Path) -> dict[str, Path]:
        once = pico.make_t5(tmp_path / "once")
        shared = load_file(once / "model.safetensors")["shared.weight"]
        copies = {f"{side}.embed_tokens.weight": shared.clone() for side in ("encoder", "decoder")}
        (one,) = pico.experts(tmp_path / "e", once, 1)
        other = load_file(one / "model.safetensors")["shared.weight"]
        return {
            "once": once,
            "thrice": rewritten(once, tmp_path / "thrice", copies),
            "one": one,
            "one thrice": rewritten(one, tmp_path / "one3", {name: other.clone() for name in copies}),
        }

    def test_expert_stores_it_more_often_than_the_base(self, t5: dict[str, Path], tmp_path: Path) -> None:
        made = plait.merge(linear(t5["once"], t5["once"], t5["one thrice"]), tmp_path / "out")
        plain = plait.merge(linear(t5["once"], t5["once"], t5["one"]), tmp_path / "plain")
        assert made.hashes == plain.hashes
        assert "one3: 'encoder.embed_tokens.weight' is a second copy of 'shared.weight' and is left out" in (
            made.plan.notes
        )
        assert not made.plan.heads

    def test_base_stores_it_more_often_than_the_expert(self, t5: dict[str, Path], tmp_path: Path) -> None:
        made = plait.merge(linear(t5["thrice"], t5["thrice"], t5["one"]), tmp_path / "out")
        got, one, base = (load_file(f / "model.safetensors") for f in (made.path, t5["one"], t5["once"]))
        want = (one["shared.weight"] + base["shared.weight"]) / 2
        for name in ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            torch.testing.assert_close(got[name], want, rtol=1e-6, atol=1e-7)
        assert "expert0: 'decoder.embed_tokens.weight' is tied to 'shared.weight'" in made.plan.notes

    @pytest.mark.parametrize("tied", [True, False], ids=["all tied", "head untied"])
    @pytest.mark.parametrize("expert", ["one", "one thrice"])
    def test_copies_stay_equal_under_random_methods(
        self, expert: str, tied: bool, t5: dict[str, Path], tmp_path: Path
    ) -> None:
        """Without a tied head T5's embeddings are still one."""
        config = json.loads((t5["thrice"] / "config.json").read_text())
        (t5["thrice"] / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
        data = {**linear(t5["thrice"], t5[expert]), "merge_method": "dare_linear", "parameters": {"density": 0.5}}
        got = load_file(plait.merge(data, tmp_path / "out").path / "model.safetensors")
        for side in ("encoder", "decoder"):
            assert torch.equal(got[f"{side}.embed_tokens.weight"], got["shared.weight"]), side

    def test_a_copy_that_differs_is_the_experts_own(self, t5: dict[str, Path], tmp_path: Path) -> None:
        values = torch.zeros(pico.VOCAB, pico.WIDTH)
        torn = rewritten(t5["one"], tmp_path / "torn", {"encoder.embed_tokens.weight": values})
        made = plait.merge(linear(t5["once"], t5["once"], torn), tmp_path / "out")
        head = load_file(made.path / "heads" / "torn.safetensors")
        assert set(head) == {"encoder.embed_tokens.weight"}
        assert torch.equal(head["encoder.embed_tokens.weight"], values)

    def test_untied_heads_are_not_guessed(self, tmp_path: Path) -> None:
        base = pico.make_llama(tmp_path / "base")
        (one,) = pico.experts(tmp_path / "e", base, 1)
        tensors = load_file(one / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, one / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is missing, though base has it"):
            plait.make_plan(plait.load_recipe(linear(base, base, one)))

    def test_bert_mlm_decoder(self, tmp_path: Path) -> None:
        base = pico.make_bert(tmp_path / "base")
        bare = {f"bert.{name}": values for name, values in load_file(base / "model.safetensors").items()}
        word, bias = bare["bert.embeddings.word_embeddings.weight"], torch.ones(pico.VOCAB)
        tensors = {
            **bare,
            "cls.predictions.bias": bias,
            "cls.predictions.decoder.bias": bias.clone(),
            "cls.predictions.decoder.weight": word.clone(),
        }
        (tmp_path / "mlm").mkdir()
        save_file(tensors, tmp_path / "mlm" / "model.safetensors", metadata={"format": "pt"})
        made = plait.merge(linear(base, base, tmp_path / "mlm"), tmp_path / "out")
        assert set(load_file(made.path / "heads" / "mlm.safetensors")) == {
            "cls.predictions.bias",
            "cls.predictions.decoder.bias",
        }


DINO: dict[str, Any] = {
    "hidden_size": pico.WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": pico.HEADS,
    "image_size": 28,
    "patch_size": 14,
    "mlp_ratio": 2,
}


class TestNamesInMemory:
    """Dinov2: `attention.attention.query` in the file is `attention.q_proj` in memory under transformers 5."""

    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.Dinov2Model(transformers.Dinov2Config(**DINO))
        model.save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    def adapter(self, folder: Path, model: Any, seed: int, targets: list[str], **options: Any) -> dict[str, Any]:
        """Train nothing, but give B values; write the adapter, and return the merged model's tensors."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, **options))
            with torch.no_grad():
                for name, parameter in wrapped.named_parameters():
                    if "lora_B" in name:
                        parameter.copy_(0.05 * torch.randn_like(parameter))
        wrapped.save_pretrained(str(folder))
        wrapped.merge_and_unload().save_pretrained(folder.with_name(f"{folder.name}-full"))  # pyright: ignore[reportCallIssue]
        return load_file(folder.with_name(f"{folder.name}-full") / "model.safetensors")

    def test_table(self, base: Path) -> None:
        names = list(load_file(base / "model.safetensors"))
        if "encoder.layer.0.attention.attention.query.weight" not in names:
            pytest.skip("this transformers writes other names")
        table = in_memory_names(json.loads((base / "config.json").read_text()), names)
        model = transformers.Dinov2Model.from_pretrained(base)
        assert set(table) == set(names)
        assert set(table.values()) == set(model.state_dict())

    def test_an_adapter_gives_what_its_merged_model_gives(self, base: Path, tmp_path: Path) -> None:
        full = {}
        for seed, (name, targets) in enumerate({"a": ["q_proj", "v_proj", "fc1"], "b": ["o_proj", "k_proj"]}.items()):
            model = transformers.Dinov2Model.from_pretrained(base)
            full[name] = self.adapter(tmp_path / name, model, seed, targets)
        before = load_file(base / "model.safetensors")
        for name, want in full.items():
            changed = [n for n in before if not torch.equal(before[n], want[n])]
            assert len(changed) == {"a": 6, "b": 4}[name], "the adapter must do something"
            made = plait.merge(
                {
                    "merge_method": "task_arithmetic",
                    "base_model": str(base),
                    "models": [{"model": str(tmp_path / name)}],
                },
                tmp_path / f"{name}-out",
            )
            assert {t.name for t in made.plan.merged} == set(changed)
            got = load_file(made.path / "model.safetensors")
            for tensor, values in want.items():
                torch.testing.assert_close(got[tensor], values, rtol=1e-6, atol=1e-6)
        both = {
            "merge_method": "task_arithmetic",
            "base_model": str(base),
            "models": [{"model": str(tmp_path / "a")}, {"model": str(tmp_path / "b")}],
        }
        got = load_file(plait.merge(both, tmp_path / "out").path / "model.safetensors")
        for tensor, values in before.items():
            want = values + (full["a"][tensor] - values) + (full["b"][tensor] - values)
            torch.testing.assert_close(got[tensor], want, rtol=1e-6, atol=1e-6)

    def test_adapters_of_a_classifier_keep_their_heads(self, base: Path, tmp_path: Path) -> None:
        model = transformers.Dinov2ForImageClassification.from_pretrained(base, num_labels=3)
        want = self.adapter(tmp_path / "a", model, 3, ["q_proj"], modules_to_save=["classifier"])
        data = {"merge_method": "task_arithmetic", "base_model": str(base), "models": [{"model": str(tmp_path / "a")}]}
        made = plait.merge(data, tmp_path / "out")
        got = load_file(made.path / "model.safetensors")
        assert set(got) == set(load_file(base / "model.safetensors"))
        for name, values in got.items():
            torch.testing.assert_close(values, want[f"dinov2.{name}"], rtol=1e-6, atol=1e-6)
        head = load_file(made.path / "heads" / "a.safetensors")
        assert set(head) == {"classifier.weight", "classifier.bias"}
        assert torch.equal(head["classifier.weight"], want["classifier.weight"])

    def test_a_target_that_the_base_lacks_is_refused(self, base: Path, tmp_path: Path) -> None:
        self.adapter(tmp_path / "a", transformers.Dinov2Model.from_pretrained(base), 0, ["q_proj"])
        path = tmp_path / "a" / "adapter_model.safetensors"
        tensors = load_file(path)
        for side in "AB":
            old = f"base_model.model.encoder.layer.1.attention.q_proj.lora_{side}.weight"
            tensors[old.replace("layer.1", "layer.7")] = tensors.pop(old)
        save_file(tensors, path)
        data = {"merge_method": "task_arithmetic", "base_model": str(base), "models": [{"model": str(tmp_path / "a")}]}
        with pytest.raises(
            CheckpointError, match=r"updates 'encoder\.layer\.7\.attention\.q_proj\.weight', which .*ot have"
        ):
            plait.make_plan(plait.load_recipe(data))

    def test_no_table_without_an_architecture(self) -> None:
        assert in_memory_names({}, ["a.weight"]) == {}
        assert in_memory_names({"model_type": "nobody-knows"}, ["a.weight"]) == {}
        assert in_memory_names({"model_type": ["llama"]}, ["a.weight"]) == {}
