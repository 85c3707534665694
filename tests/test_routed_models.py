"""Routed models as users meet them: loaded in a fresh process, generating, learned, measured; and what errors say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import transformers
from mini_suite import MiniSuite
from safetensors.torch import load_file, save_file
from test_routing import build, out, recipe
from typer.testing import CliRunner

import plait
from plait.cli import app
from plait.errors import CheckpointError, MachineError, RecipeError
from plait.evaluate.contenders import by_method
from plait.evaluate.measure import evaluate
from plait.evaluate.subjects import Options
from plait.models.net import read_config
from plait.recipe import load_recipe


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    root = tmp_path_factory.mktemp("routed")
    base = pico.make_llama(root / "base")
    pico.add_tokenizer(base)
    return base, pico.experts(root / "experts", base, 3)


@pytest.fixture(scope="module")
def twin(parts: tuple[Path, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "twin"
    build(recipe(*parts, "twin", route={"rank": 4, "precision": "int8"}), folder)
    return folder


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


IDS = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


class TestLoading:
    @pytest.mark.parametrize("how", ["plait.from_pretrained", "transformers.AutoModelForCausalLM.from_pretrained"])
    @pytest.mark.parametrize("order", ["import plait, transformers", "import transformers, plait"])
    def test_in_a_fresh_process(self, twin: Path, how: str, order: str, tmp_path: Path) -> None:
        wanted = out(plait.from_pretrained(twin), {"input_ids": IDS})
        done = run(
            f"{order}\nimport torch\nm = {how}({str(twin)!r})\nassert isinstance(m, transformers.LlamaForCausalLM)\n"
            f"with torch.no_grad(): y = m(input_ids=torch.tensor({IDS.tolist()})).logits\n"
            f"torch.save(y, {str(tmp_path / 'y.pt')!r})"
        )
        assert done.returncode == 0, done.stderr
        assert float((torch.load(tmp_path / "y.pt") - wanted).abs().max()) <= 1e-6

    def test_without_plait_it_is_refused_with_a_sentence(self, twin: Path) -> None:
        done = run(f"import transformers\ntransformers.AutoModelForCausalLM.from_pretrained({str(twin)!r})")
        assert done.returncode != 0
        assert "plait_routed" in done.stderr
        with pytest.raises(OSError, match=r"model\.safetensors"):  # never fresh layers
            transformers.LlamaForCausalLM.from_pretrained(twin)

    def test_plait_does_not_load_transformers(self) -> None:
        done = run("import sys, plait\nassert not {'torch', 'transformers'} & set(sys.modules)")
        assert done.returncode == 0, done.stderr

    def test_half_precision_and_back(self, twin: Path, tmp_path: Path) -> None:
        model = plait.from_pretrained(twin)
        wanted = out(model, {"input_ids": IDS})
        half = plait.from_pretrained(twin, dtype="bfloat16")
        assert half.dtype == torch.bfloat16
        assert float((out(half, {"input_ids": IDS}).float() - wanted).abs().max()) < 0.05
        model.half().save_pretrained(tmp_path / "half")
        again = plait.from_pretrained(tmp_path / "half")
        assert again.dtype == torch.float16
        assert torch.equal(out(again, {"input_ids": IDS}), out(model, {"input_ids": IDS}))

    def test_exported_and_compiled(self, twin: Path) -> None:
        model = plait.from_pretrained(twin)
        given = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}
        program = torch.export.export(model, (), given)
        wanted = out(model, given)
        assert torch.allclose(program.module()(**given).logits, wanted, atol=1e-5)
        # The graph alone is what can go wrong here; generating code for it would need a compiler on the machine.
        assert torch.allclose(out(torch.compile(model, backend="eager"), given), wanted, atol=1e-5)

    def test_a_routed_model_is_no_expert(self, parts: tuple[Path, list[Path]], twin: Path, tmp_path: Path) -> None:
        asked = recipe(parts[0], [parts[1][0], twin], "task_arithmetic")
        with pytest.raises(CheckpointError, match="is a routed model"):
            plait.merge(asked, tmp_path / "out")


class TestGenerating:
    @pytest.mark.parametrize("method", ["twin", "wemoe", "smile"])
    def test_different_prompts_in_one_batch(self, parts: tuple[Path, list[Path]], method: str, tmp_path: Path) -> None:
        model = build(recipe(*parts, method), tmp_path / method)
        how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        together = model.generate(input_ids=IDS, attention_mask=MASK, **how)
        alone = model.generate(input_ids=IDS[1:, 2:], attention_mask=MASK[1:, 2:], **how)
        assert together[1, 4:].tolist() == alone[0, 2:].tolist()
        beams = model.generate(input_ids=IDS, attention_mask=MASK, num_beams=2, **how)
        assert beams.shape == (2, 10)

    def test_a_sequence_is_routed_once_by_its_prompt(self, twin: Path) -> None:
        model = plait.from_pretrained(twin)
        asked: list[int] = []
        decide = model.routing.features.decide
        model.routing.features.decide = lambda features: asked.append(len(features)) or decide(features)
        model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert asked == [2]


class TestLearning:
    def test_twin_learns_whose_input_it_is(self, mini: MiniSuite, tmp_path: Path) -> None:
        made = plait.merge(by_method("twin", mini.suite, {"rank": 8, "epochs": 30}), tmp_path / "twin")
        found = evaluate(made.path, mini.suite, options=Options(use_cache=False))
        assert found.routing is not None
        assert min(found.routing.right.values()) > 0.7
        for task, chosen in found.routing.chosen.items():
            assert sum(chosen) == found.tasks[task].samples
            assert found.routing.blind[task] <= found.tasks[task].score.value
        shown = CliRunner().invoke(app, ["inspect", str(made.path / "state")]).output
        assert "of watched inputs go to their own expert" in " ".join(shown.split())
        static = plait.merge(by_method("task_arithmetic", mini.suite, {"weight": 0.3}), tmp_path / "static")
        plain = evaluate(static.path, mini.suite, options=Options(use_cache=False))
        assert found.average.value > plain.average.value
        assert plain.routing is None

    def test_routers_resume_to_the_same_state(
        self, mini: MiniSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from plait.learn import loop, routers

        asked = by_method("wemoe", mini.suite, {"steps": 6, "batch": 4})
        plait.fit(asked, tmp_path / "whole", threads=1)
        monkeypatch.setattr(loop, "_SAVE_SECONDS", 0.0)
        step = routers.LayerRouters.step

        def stops(self: Any, index: int) -> dict[str, float]:
            if index == 3:
                raise KeyboardInterrupt
            return step(self, index)

        monkeypatch.setattr(routers.LayerRouters, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            plait.fit(asked, tmp_path / "cut", threads=1)
        monkeypatch.setattr(routers.LayerRouters, "step", step)
        plait.fit(asked, tmp_path / "cut", threads=1, resume=True)
        for name in ("state.json", "state.safetensors"):
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()

    def test_a_state_gives_the_same_model_without_data(self, mini: MiniSuite, tmp_path: Path) -> None:
        asked = by_method("wemoe", mini.suite, {"steps": 3, "batch": 4}).model_copy(update={"data": None})
        learned = by_method("wemoe", mini.suite, {"steps": 3, "batch": 4})
        plait.fit(learned, tmp_path / "state")
        one = plait.merge(asked, tmp_path / "one", state=tmp_path / "state", threads=1)
        two = plait.merge(asked, tmp_path / "two", state=tmp_path / "state", threads=2)
        assert one.hashes == two.hashes
        other = by_method("wemoe", mini.suite, {"depth": 1})
        with pytest.raises(RecipeError, match="was learned with the parameters"):
            plait.merge(other, tmp_path / "other", state=tmp_path / "state")

    def test_a_router_of_tasks_goes_with_any_compression(self, mini: MiniSuite, tmp_path: Path) -> None:
        plait.fit(by_method("twin", mini.suite, {"rank": 8, "epochs": 3}), tmp_path / "state")
        routers = []
        for name, route in {
            "thin": {"rank": 1, "precision": "int8"},
            "pruned": {"keep": "magnitude", "top": 1},
        }.items():
            made = plait.merge(by_method("twin", mini.suite, route), tmp_path / name, state=tmp_path / "state")
            assert evaluate(made.path, mini.suite, options=Options(use_cache=False)).routing is not None
            held = load_file(made.path / "routed.safetensors")
            routers.append({key: value for key, value in held.items() if key.startswith("routers.")})
        assert routers[0]
        assert all(torch.equal(value, routers[1][key]) for key, value in routers[0].items())
        other = by_method("twin", mini.suite).model_copy(update={"shared": "average"})
        with pytest.raises(RecipeError, match="was learned with the parameters"):
            plait.merge(other, tmp_path / "other", state=tmp_path / "state")

    def test_a_switch_may_become_a_router(self, mini: MiniSuite, tmp_path: Path) -> None:
        plait.merge(by_method("emr", mini.suite), tmp_path / "told")
        assert evaluate(tmp_path / "told", mini.suite, options=Options(use_cache=False)).protocol.task_id == "model"
        plait.merge(by_method("emr", mini.suite, {"router": True}), tmp_path / "routed")
        found = evaluate(tmp_path / "routed", mini.suite, options=Options(use_cache=False))
        assert found.protocol.task_id == "head"
        assert found.routing is not None

    def test_what_is_shared_may_be_any_method(self, mini: MiniSuite, tmp_path: Path) -> None:
        asked = by_method("smile", mini.suite, {"rank": 2})
        for place, shared in enumerate(["tsv_m", {"merge_method": "ties", "finish": [{"scale": {"lambda": 0.5}}]}]):
            plait.merge(asked.model_copy(update={"shared": shared}), tmp_path / str(place))
        one, two = (load_file(tmp_path / str(place) / "routed.safetensors") for place in (0, 1))
        name = next(key for key in one if key.endswith("LayerNorm.weight"))
        assert not torch.equal(one[name], two[name])

    def test_the_papers_protocol_mixes_once_for_a_batch(self, mini: MiniSuite, tmp_path: Path) -> None:
        plait.merge(by_method("twin", mini.suite, {"rank": 8, "epochs": 5}), tmp_path / "twin")
        honest, paper = (
            evaluate(tmp_path / "twin", mini.suite, options=Options(use_cache=False, mixed=mixed))
            for mixed in (True, False)
        )
        assert (honest.protocol.mixed_batches, paper.protocol.mixed_batches) == (True, False)
        assert paper.routing is not None
        assert all(max(chosen) == sum(chosen) for chosen in paper.routing.chosen.values())


class TestErrors:
    def damaged(self, twin: Path, to: Path) -> Path:
        shutil.copytree(twin, to)
        return to

    def test_a_truncated_file(self, twin: Path, tmp_path: Path) -> None:
        folder = self.damaged(twin, tmp_path / "m")
        path = folder / "routed.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"routed\.safetensors: is truncated"):
            plait.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda t: t.pop(next(k for k in t if ".experts." in k)), "lacks '.*experts"),
            (lambda t: t.pop("model.norm.base.weight"), "lacks 'model.norm.weight'"),
            (lambda t: t.update({"model.more.weight": torch.ones(2)}), "holds 'model.more.weight', which Llama"),
            (lambda t: t.update({"model.norm.experts.x.values": torch.ones(2)}), "config.json does not describe"),
            (lambda t: t.pop("routers.0.layers.0.weight"), "lacks 'routers.0.layers.0.weight' of its router"),
            (lambda t: t.update({"routers.0.layers.0.weight": torch.ones(4, 4)}), "belongs to another model"),
        ],
    )
    def test_tensors_that_are_not_those_of_the_layout(self, twin: Path, tmp_path: Path, change: Any, says: str) -> None:
        folder = self.damaged(twin, tmp_path / "m")
        tensors = load_file(folder / "routed.safetensors")
        change(tensors)
        save_file(tensors, folder / "routed.safetensors")
        with pytest.raises(CheckpointError, match=says):
            plait.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda c: c["plait"].update(format=99), "this version of Plait reads 1; upgrade"),
            (lambda c: c["plait"].pop("layers"), "description of routed layers is damaged"),
            (lambda c: c["plait"].update(architecture="os"), "names the architecture 'os'"),
            (lambda c: c["plait"]["router"].update(kind="magic"), "a router of a kind that is not known"),
            (lambda c: c["plait"]["layers"]["model.norm"]["weight"].update(shape=[-1]), "in a form that"),
            (lambda c: c["plait"]["layers"].update({"model.none": {}}), "routes 'model.none', which Llama"),
        ],
    )
    def test_a_config_that_lies(self, twin: Path, tmp_path: Path, change: Any, says: str) -> None:
        folder = self.damaged(twin, tmp_path / "m")
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=says):
            plait.from_pretrained(folder)

    def test_a_task_that_is_not_there(self, parts: tuple[Path, list[Path]], twin: Path) -> None:
        name = parts[1][0].name
        with pytest.raises(RecipeError, match=f"no expert is called '{name}x'; did you mean '{name}'"):
            plait.from_pretrained(twin, task=f"{name}x")

    def test_a_switch_that_was_not_told(self, parts: tuple[Path, list[Path]], tmp_path: Path) -> None:
        model = build(recipe(*parts, "emr"), tmp_path / "emr")
        with pytest.raises(RecipeError, match=r"was not told which: call model\.set_task"):
            model(input_ids=IDS)
        with pytest.raises(ValueError, match="a batch of 2 does not go with weights for 3 samples"):
            model(input_ids=IDS, tasks=[parts[1][0].name] * 3)

    def test_not_a_routed_model(self, parts: tuple[Path, list[Path]]) -> None:
        with pytest.raises(CheckpointError, match="is no routed model; load it with transformers"):
            plait.from_pretrained(parts[0])
        assert "plait" not in read_config(parts[0], "base")

    @pytest.mark.parametrize(
        ("more", "says"),
        [
            ({"route": {"rnak": 3}}, "twin has no route option 'rnak'; did you mean 'rank'"),
            ({"route": {"weight": 3}}, "'weight' stands under parameters:"),
            ({"route": {"ratio": 2}}, r"ratio: must be a number in \[0, 1\], got 2"),
            ({"shared": "wemoe"}, "is routed itself"),
            ({"shared": "adamerging"}, "adamerging learns; fit it first"),
            ({"shared": {"method": "ties"}}, "has no key 'method'"),
            ({"finish": [{"scale": {"lambda": 2}}]}, "move the stages there"),
        ],
    )
    def test_recipes(self, parts: tuple[Path, list[Path]], more: dict[str, Any], says: str) -> None:
        from plait.plan import make_plan

        with pytest.raises(RecipeError, match=says):
            make_plan(load_recipe(recipe(*parts, "twin", **more)))
        if "route" in more and "rnak" in more["route"]:
            with pytest.raises(RecipeError, match="route: is for routed methods"):
                make_plan(load_recipe(recipe(*parts, "ties", **more)))

    def test_experts_that_change_nothing(self, parts: tuple[Path, list[Path]], tmp_path: Path) -> None:
        same = tmp_path / "same"
        shutil.copytree(parts[0], same)
        with pytest.raises(CheckpointError, match="no expert changes a layer that it routes"):
            plait.merge(recipe(parts[0], [same], "emr"), tmp_path / "out")

    def test_too_little_memory(self, parts: tuple[Path, list[Path]], tmp_path: Path) -> None:
        with pytest.raises(MachineError, match="whole tensors"):
            plait.merge(recipe(*parts, "emr"), tmp_path / "out", memory="300KB")


def test_an_older_bert_with_saved_position_ids(tmp_path: Path) -> None:
    """Checkpoints of before transformers 4.31 hold a buffer that today's models make by themselves."""
    base = pico.make_bert(tmp_path / "base")
    experts = pico.experts(tmp_path / "experts", base, 2)
    for folder in (base, *experts):
        tensors = pico.read(folder)
        tensors["embeddings.position_ids"] = torch.arange(64)[None]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    merged = plait.merge(recipe(base, experts, "smile"), tmp_path / "out")
    assert any("position_ids" in note for note in merged.notes)
    model = plait.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).last_hidden_state).all()
