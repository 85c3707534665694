"""Methods that see a few inputs and merge in closed form, and surgery: against slow references, on whole folders."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import mini_suite
import numpy as np
import pico
import pytest
import reference_fitted as ref
import torch
import transformers
import yaml
from mini_suite import MiniSuite
from safetensors.torch import load_file, save_file
from torch import Tensor

import plait
from plait import RecipeError
from plait.engine import Engine
from plait.evaluate.contenders import by_method
from plait.evaluate.measure import evaluate
from plait.evaluate.subjects import Options
from plait.learn.bench import Workbench
from plait.learn.data import Inputs, suite_of_recipe
from plait.learn.regmean import Regression, least_squares, regmean, regmean_pp, without_padding
from plait.learn.statistics import Fisher
from plait.learn.vectors import TaskVectors
from plait.models.heads import head_of, read_head
from plait.models.net import Batch
from plait.plan import make_plan
from plait.recipe import load_recipe
from plait.stages import Silent
from plait.state import load_state
from plait.suites.data import load_split
from plait.suites.definition import Suite, read_suite

FEW = {"inputs": 20}
METHODS = [("fisher", {"inputs": 5}), ("regmean", FEW), ("regmean_pp", FEW), ("surgery", {"steps": 40, "rank": 4})]


def recipe(suite: Suite, method: str, **settings: Any) -> dict[str, Any]:
    """The suite's experts by a method that learns, as plain data."""
    found = by_method(method, suite, settings).model_dump(exclude_defaults=True)
    assert suite._file is not None
    return {**found, "data": str(suite._file)}


class Trial:
    """What a learner works with, put together by hand."""

    def __init__(self, suite: Suite, folder: Path, method: str, memory: int = 1 << 28, **settings: Any) -> None:
        self.plan = make_plan(load_recipe(recipe(suite, method, **settings)))
        engine = Engine(threads=1, memory=memory, device="cpu", progress=Silent())
        self.inputs = Inputs(suite_of_recipe(self.plan, "adapt"), "adapt", 0)
        self.bench = Workbench(self.plan, engine, self.inputs, self.plan.fit)
        assert self.plan.method.learned is not None
        folder.mkdir(exist_ok=True)
        self.vectors = TaskVectors(self.plan, engine, folder / "vectors.bin", self.plan.method.learned.vectors)

    @property
    def parts(self) -> tuple[Workbench, TaskVectors, Any]:
        return self.bench, self.vectors, self.plan.fit


def close(found: Any, wanted: Any, limit: float = 1e-5) -> None:
    """Equal up to a share of the largest entry."""
    one, two = (np.asarray(value, dtype=np.float64) for value in (found, wanted))
    assert one.shape == two.shape
    assert np.abs(two).max() > 0
    assert np.abs(one - two).max() <= limit * np.abs(two).max()


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "timing.json"
    }


def plain_inputs(suite: Suite, folder: Path, task: str, rows: list[int]) -> list[dict[str, Tensor]]:
    """Every input alone, as transformers' own processor gives it: nothing is padded."""
    split = load_split(suite, task, "adapt")
    if split.is_image:
        processor = transformers.ViTImageProcessor.from_pretrained(folder)
        return [dict(processor(images=[split[row]], return_tensors="pt")) for row in rows]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [value if isinstance(value, tuple) else (value,) for value in (split[row] for row in rows)]
    return [dict(tokenizer(*text, truncation=True, max_length=16, return_tensors="pt")) for text in texts]


def expert_of(suite: Suite, task: str) -> Any:
    return transformers.AutoModel.from_pretrained(suite.place(suite.tasks[task].expert)).eval()


@torch.inference_mode()
def captured(body: Any, inputs: list[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """What every Linear layer reads, [rows, in], one input after the other."""
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    for name, layer in body.named_modules():
        if isinstance(layer, torch.nn.Linear):
            seen[name] = []
            keep = seen[name]
            hooks.append(layer.register_forward_hook(lambda _, args, out, keep=keep: keep.append(args[0])))  # type: ignore[misc]
    for each in inputs:
        body(**each)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([x.reshape(-1, x.shape[-1]) for x in xs]).numpy() for name, xs in seen.items() if xs}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """A ViT with two experts, heads of their own files and images on disk."""
    from PIL import Image

    root = tmp_path_factory.mktemp("pictures")
    base = pico.make_vit(root / "base")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(base)
    random = np.random.default_rng(0)
    tasks: dict[str, Any] = {}
    for place, folder in enumerate(pico.experts(root / "experts", base, 2, scale=0.5)):
        task = f"task{place}"
        head = {"weight": torch.randn(3, 32, generator=torch.Generator().manual_seed(place)), "bias": torch.zeros(3)}
        names = json.dumps({str(index): kind for index, kind in enumerate("abc")})
        save_file(head, root / f"{task}.safetensors", metadata={"id2label": names})
        for split in ("adapt", "test"):
            for row in range(15):
                into = root / task / split / "cab"[row % 3]
                into.mkdir(parents=True, exist_ok=True)
                pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(into / f"{row}.png")
        data = {split: f"{task}/{split}" for split in ("adapt", "test")}
        # The head counts the classes in another order than the data.
        tasks[task] = {
            "expert": f"experts/{folder.name}", "head": f"{task}.safetensors", "classes": ["c", "a", "b"], "data": data,
        }  # fmt: skip
    text = {"name": "pictures", "base": "base", "tasks": tasks}
    (root / "suite.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
    return read_suite(root / "suite.yaml")


@pytest.fixture(params=["texts", "images"])
def suite(request: pytest.FixtureRequest, mini: MiniSuite, pictures: Suite) -> Suite:
    return mini.suite if request.param == "texts" else pictures


class TestRegMean:
    @pytest.mark.parametrize("memory", [1 << 28, 1])
    def test_agrees_with_the_reference_on_captured_activations(self, suite: Suite, tmp_path: Path, memory: int) -> None:
        trial = Trial(suite, tmp_path / "trial", "regmean", memory, off_diagonal=0.9, batch=7, **FEW)
        found, _ = regmean(*trial.parts)
        rows, base = trial.inputs.some(20), Path(suite.place(suite.base))
        assert all(len(listed) == min(20, len(trial.inputs.splits[task])) for task, listed in rows.items())
        bodies = {task: expert_of(suite, task) for task in sorted(suite.tasks)}
        inputs = [captured(body, plain_inputs(suite, base, task, rows[task])) for task, body in bodies.items()]
        places = {id(place): key for key, place in trial.bench.places.items()}
        checked = 0
        for name, layer in trial.bench.net.body.named_modules():
            if not isinstance(layer, torch.nn.Linear) or name not in inputs[0]:
                continue
            weights = [body.get_submodule(name).weight.detach().numpy() for body in bodies.values()]
            wanted = ref.regmean([each[name] for each in inputs], weights, 0.9)
            key = places[id(layer.weight)]
            close(trial.vectors.base(key).view(trial.vectors.shape(key)) + found[key], wanted)
            checked += 1
        assert checked == len(found) >= 12

    @pytest.mark.parametrize("name", ["regmean", "regmean_pp"])
    def test_merged_files_hold_it_and_the_mean_of_the_rest(self, mini: MiniSuite, tmp_path: Path, name: str) -> None:
        merged = plait.merge(recipe(mini.suite, name, **FEW), tmp_path / "out")
        state = load_state(merged.path / "state")
        weights, base = load_file(merged.path / "model.safetensors"), load_file(mini.base / "model.safetensors")
        bodies = [expert_of(mini.suite, task).state_dict() for task in mini.suite.tasks]
        assert state.facts["summary"] == {"inputs": dict.fromkeys(sorted(mini.suite.tasks), 20), "linear_layers": 13}
        for key, value in weights.items():
            delta = state.tensor(f"delta/{key}")
            mean = sum(body[key].double() for body in bodies) / 3
            close(value, mean if delta is None else base[key] + delta, 1e-6)
            linear = key.endswith("weight") and "Norm" not in key and "embeddings" not in key
            assert (delta is not None) == linear

    @pytest.mark.parametrize("name", ["regmean", "regmean_pp", "fisher"])
    def test_one_expert_is_the_expert(self, mini: MiniSuite, tmp_path: Path, name: str) -> None:
        plait.merge(recipe(mini.suite.only(["tone"]), name, **FEW), tmp_path / "out")
        own = load_file(mini.expert("tone") / "model.safetensors")
        for key, value in load_file(tmp_path / "out" / "model.safetensors").items():
            torch.testing.assert_close(value, own[key], rtol=0, atol=2e-6)

    def test_each_layer_reads_what_the_merged_layers_before_it_give(self, mini: MiniSuite, tmp_path: Path) -> None:
        trial = Trial(mini.suite, tmp_path / "trial", "regmean_pp", **FEW)
        found, _ = regmean_pp(*trial.parts)
        tasks, rows = sorted(mini.suite.tasks), trial.inputs.some(20)
        bodies = [expert_of(mini.suite, task) for task in tasks]
        whole = expert_of(mini.suite, tasks[0])
        states = [body.state_dict() for body in bodies]
        merged = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
        for layer in ("encoder.layer.0.", "encoder.layer.1."):
            inputs = []
            for task, state in zip(tasks, states, strict=True):
                whole.load_state_dict({n: v if n.startswith(layer) else merged[n] for n, v in state.items()})
                inputs.append(captured(whole, plain_inputs(mini.suite, mini.base, task, rows[task])))
            for name in inputs[0]:
                if name.startswith(layer):
                    key = f"{name}.weight"
                    wanted = ref.regmean([x[name] for x in inputs], [state[key].numpy() for state in states])
                    close(trial.vectors.base(key).view(wanted.shape) + found[key], wanted, 2e-5)
                    merged[key] = torch.tensor(wanted, dtype=torch.float32)

    def test_the_first_layer_is_regmeans_where_nothing_before_it_differs(self, mini: MiniSuite, tmp_path: Path) -> None:
        path = mini.copy(tmp_path / "copy")
        base = load_file(mini.base / "model.safetensors")
        for task in mini.suite.tasks:
            file = tmp_path / "copy" / "experts" / task / "model.safetensors"
            stored = load_file(file)
            same = {n: base[n.removeprefix("bert.")] if "embeddings" in n else v for n, v in stored.items()}
            save_file(same, file, metadata={"format": "pt"})
        one, two = (
            run(*Trial(read_suite(path), tmp_path / run.__name__, run.__name__, **FEW).parts)[0]
            for run in (regmean, regmean_pp)
        )
        assert list(one) == list(two)
        for key in one:
            if key.startswith("encoder.layer.0."):
                close(two[key], one[key], 1e-6)
            else:
                assert not torch.allclose(two[key], one[key], rtol=1e-3, atol=1e-5)

    def test_nothing_after_the_layers_that_are_asked_runs(self, mini: MiniSuite, tmp_path: Path) -> None:
        trial = Trial(mini.suite, tmp_path / "trial", "regmean_pp", **FEW)
        fit, ran = Regression(*trial.parts), []
        for name, layer in trial.bench.net.body.named_modules():
            layer.register_forward_hook(lambda *_, name=name: ran.append(name))  # type: ignore[misc]
        fit.solve([key for key in fit.keys if key.startswith("encoder.layer.0.")], lambda k: None)
        assert "encoder.layer.0.intermediate.dense" in ran
        assert not [name for name in ran if name.startswith("encoder.layer.1")]

    def test_padding_does_not_count(self) -> None:
        x = torch.arange(12.0).view(2, 3, 2)
        mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        assert without_padding(x, "encoder.layer.0", {"attention_mask": mask})[:, 0].tolist() == [0, 2, 6]
        assert without_padding(x[:, 0], "pooler", {"attention_mask": mask}).shape == (2, 2)
        assert without_padding(x, "any", {}).shape == (6, 2)
        both = {"attention_mask": mask, "targets": torch.tensor([[4, -100, -100], [4, 5, 6]])}
        name = "decoder.block.0.layer.1.EncDecAttention"
        assert without_padding(x, f"{name}.q", both)[:, 0].tolist() == [0, 6, 8, 10]
        assert without_padding(x, f"{name}.v", both)[:, 0].tolist() == [0, 2, 6]
        assert without_padding(x, "encoder.block.0.layer.0.SelfAttention.q", both)[:, 0].tolist() == [0, 2, 6]

    def test_what_no_input_reaches_is_the_mean(self) -> None:
        taus = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        gram = torch.diag(torch.tensor([1.0, 2.0, 0.0, 3.0], dtype=torch.float64))
        found = least_squares(gram, gram @ taus[0].T, taus.mean(0))
        close(found[:, [0, 1, 3]], taus[0][:, [0, 1, 3]], 1e-9)
        close(found[:, 2], taus.mean(0)[:, 2], 1e-9)
        torch.testing.assert_close(least_squares(0 * gram, 0 * taus[0].T, taus.mean(0)), taus.mean(0))


class TestFisher:
    @pytest.mark.parametrize("labels", ["expected", "sampled"])
    def test_agrees_with_a_loop_over_samples(self, suite: Suite, tmp_path: Path, labels: str) -> None:
        tasks, base = sorted(suite.tasks), Path(suite.place(suite.base))
        weight = {task: 0.5 + place for place, task in enumerate(tasks)}
        asked = recipe(suite, "fisher", labels=labels, inputs=6)
        for model in asked["models"]:
            model["parameters"] = {"weight": weight[model["name"]]}
        plait.merge(asked, tmp_path / "out")
        inputs = Inputs(suite, "adapt", 0)
        found, own = {}, {}
        for task in tasks:
            rows = inputs.some(6)[task]
            body, net = expert_of(suite, task), Trial(suite, tmp_path / "trial", "fisher").bench.net
            body = body.to(torch.float64)
            names = [name for name, _ in body.named_parameters()]
            squares = {name: torch.zeros_like(value) for name, value in body.named_parameters()}
            for row, each in zip(rows, plain_inputs(suite, base, task, rows), strict=True):
                batch = Batch({n: v.double() if v.is_floating_point() else v for n, v in each.items()}, {})
                features = net.family.features(body, batch.inputs, net.pooling)  # type: ignore[misc]
                logp = net.heads[task].to("cpu", torch.float64)(features)[0].log_softmax(-1)
                p = logp.detach().exp()
                counted = {y: float(p[y]) for y in range(len(p))}
                if labels == "sampled":
                    at = inputs.random(task, f"label {row}").random()
                    counted = {int((p.cumsum(0) <= at).sum()): 1.0}
                for y, share in counted.items():
                    grads = torch.autograd.grad(logp[y], list(body.parameters()), retain_graph=True, allow_unused=True)
                    for name, grad in zip(names, grads, strict=True):
                        if grad is not None:
                            squares[name] += share * grad.square() / len(rows)
            found[task] = {name: value.numpy() + 1e-6 for name, value in squares.items()}
            own[task] = {name: value.detach().numpy() for name, value in body.named_parameters()}
        merged = transformers.AutoModel.from_pretrained(tmp_path / "out").state_dict()
        for name in found[tasks[0]]:
            fishers, weights = ([of[task][name] for task in tasks] for of in (found, own))
            close(merged[name], ref.fisher(fishers, weights, [weight[task] for task in tasks]))

    def test_reference_sums_over_labels(self) -> None:
        gradients, p = np.array([[[1.0], [2.0]], [[3.0], [0.0]]]), np.array([[0.25, 0.75], [0.5, 0.5]])
        close(ref.fisher_of(gradients, p, 0.0), [(0.25 + 3.0 + 4.5) / 2])

    def test_what_counts_in_no_answer_is_the_weighted_mean(self, mini: MiniSuite, tmp_path: Path) -> None:
        trial = Trial(mini.suite, tmp_path / "trial", "fisher", inputs=2)
        found = Fisher(*trial.parts)
        found.measure()
        key = "pooler.dense.weight"
        close(found.deltas()[key], trial.vectors.rows(key).mean(0))

    def test_weights_belong_to_the_state(self, mini: MiniSuite, tmp_path: Path) -> None:
        asked = recipe(mini.suite, "fisher", inputs=2)
        plait.fit(asked, tmp_path / "state")
        asked["models"][0]["parameters"] = {"weight": 2.0}
        with pytest.raises(RecipeError, match="was learned with the parameters"):
            plait.merge(asked, tmp_path / "out", state=tmp_path / "state")


class TestSurgery:
    def test_brings_features_nearer_and_its_folder_is_measured_with_it(self, suite: Suite, tmp_path: Path) -> None:
        merged = plait.merge(recipe(suite, "surgery", steps=150, lr=1e-2), tmp_path / "out")
        facts = load_state(merged.path / "state").facts["summary"]
        for task, found in facts["distance"].items():
            assert found["after"] < 0.9 * found["before"], task
            assert found["kept_step"] > 0
        assert set(facts["tasks"]) == set(suite.tasks)
        result = evaluate(merged.path, suite, options=Options(use_cache=False))
        assert result.protocol.task_id == "model"
        for task, found in result.tasks.items():
            assert found.head == "model"
            assert found.predictions == self.predictions(suite, merged.path, task)

    @torch.inference_mode()
    def predictions(self, suite: Suite, folder: Path, task: str) -> list[int]:
        """By plain transformers, numpy and the files of the merged folder."""
        split = load_split(suite, task, "test")
        base = Path(suite.place(suite.base))
        body = transformers.AutoModel.from_pretrained(folder).eval()
        stored = load_file(folder / "heads" / f"{task}.safetensors")
        plain = {name.removeprefix("classifier."): value.double().numpy() for name, value in stored.items()}
        names = list(read_head(folder / "heads" / f"{task}.safetensors").names or [])
        if split.is_image:
            processor = transformers.ViTImageProcessor.from_pretrained(base)
            pixels = processor(images=[split[row] for row in range(len(split))], return_tensors="pt")
            features = body(**pixels).last_hidden_state[:, 0]
        else:
            features = mini_suite.features(folder, [split[row] for row in range(len(split))])
        mended = ref.surgery(features.numpy(), plain["surgery.down"], plain["surgery.up"])
        scores = mended @ plain["weight"].T + plain["bias"]
        order = [names.index(name) for name in split.classes] if names and split.classes else list(range(len(scores.T)))
        return scores[:, order].argmax(1).tolist()

    def test_no_steps_would_be_task_arithmetic(self, mini: MiniSuite, tmp_path: Path) -> None:
        asked = recipe(mini.suite, "surgery", steps=1, lr=1e-12)
        plain = {**{key: value for key, value in asked.items() if key not in ("data", "fit")}}
        plait.merge(asked, tmp_path / "mended")
        plait.merge({**plain, "merge_method": "task_arithmetic", "parameters": {"weight": 0.3}}, tmp_path / "plain")
        one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("mended", "plain"))
        assert all(torch.equal(one[name], two[name]) for name in two)
        options = Options(use_cache=False)
        before, after = (evaluate(tmp_path / name, mini.suite, options=options) for name in ("plain", "mended"))
        assert (before.protocol.task_id, after.protocol.task_id) == ("head", "model")
        assert all(after.tasks[task].predictions == before.tasks[task].predictions for task in mini.suite.tasks)

    def test_a_head_of_the_suite_is_written_whole_with_its_labels(self, pictures: Suite, tmp_path: Path) -> None:
        merged = plait.merge(recipe(pictures, "surgery", steps=2), tmp_path / "out")
        suite_head = load_file(pictures.place("task0.safetensors"))
        head = read_head(merged.path / "heads" / "task0.safetensors")
        assert set(head.tensors) == {"weight", "bias", "surgery.down", "surgery.up"}
        assert all(torch.equal(head.tensors[name], value) for name, value in suite_head.items())
        assert head.names == ["a", "b", "c"]

    def test_a_head_corrects_before_it_answers(self) -> None:
        draw = torch.Generator().manual_seed(0)
        z, down, up = (torch.randn(shape, generator=draw) for shape in ((5, 6), (2, 6), (6, 2)))
        weight = torch.randn(3, 6, generator=draw)
        head = head_of({"classifier.weight": weight, "surgery.down": down, "surgery.up": up}, "x")
        close(head(z), ref.surgery(z.numpy(), down.numpy(), up.numpy()) @ weight.numpy().T)

    def test_models_that_answer_in_text_are_refused(self, tmp_path: Path) -> None:
        base = mini_suite_llama(tmp_path)
        with pytest.raises(RecipeError, match="answers in text"):
            plait.merge(recipe(base, "surgery", steps=1), tmp_path / "out")


def mini_suite_llama(root: Path) -> Suite:
    """A causal model with two experts and questions of two answers."""
    base = pico.make_llama(root / "base")
    mini_suite.add_tokenizer(base, pad=False)
    tasks = {}
    for place, folder in enumerate(pico.experts(root / "experts", base, 2, scale=0.3)):
        random = np.random.default_rng(place)
        rows = [" ".join(random.choice(mini_suite.WORDS, random.integers(2, 6))) for _ in range(12)]
        for split in ("adapt", "test"):
            lines = [json.dumps({"text": f"{split[0]} {text}", "label": n % 2}) for n, text in enumerate(rows)]
            (root / f"{folder.name}-{split}.jsonl").write_text("\n".join(lines) + "\n")
        data = {split: f"{folder.name}-{split}.jsonl" for split in ("adapt", "test")}
        tasks[folder.name] = {"expert": f"experts/{folder.name}", "answers": ["w1", "w2 w3"], "data": data}
    (root / "suite.yaml").write_text(yaml.safe_dump({"name": "words", "base": "base", "tasks": tasks}))
    return read_suite(root / "suite.yaml")


class TestEveryMethod:
    @pytest.mark.parametrize(("method", "settings"), METHODS)
    def test_a_state_is_the_same_every_time_and_replays(
        self, suite: Suite, tmp_path: Path, method: str, settings: dict[str, Any]
    ) -> None:
        asked = recipe(suite, method, **settings)
        for name in ("one", "two"):
            plait.fit(asked, tmp_path / name)
        assert files(tmp_path / "one") == files(tmp_path / "two")
        without = {key: value for key, value in asked.items() if key not in ("data", "fit")}
        plait.merge(without, tmp_path / "first", state=tmp_path / "one")
        plait.merge(without, tmp_path / "again", state=tmp_path / "two", threads=2, memory="64MB")
        assert files(tmp_path / "first") == files(tmp_path / "again")
        fitted = plait.merge(asked, tmp_path / "fitted")
        weights = [(path / "model.safetensors").read_bytes() for path in (fitted.path, tmp_path / "first")]
        assert weights[0] == weights[1]
        result = evaluate(tmp_path / "first", suite, options=Options(use_cache=False))
        assert result.protocol.task_id == ("model" if method == "surgery" else "head")

    @pytest.mark.parametrize("method", ["fisher", "regmean", "regmean_pp"])
    def test_models_that_answer_in_text(self, tmp_path: Path, method: str) -> None:
        suite = mini_suite_llama(tmp_path)
        merged = plait.merge(recipe(suite, method, inputs=5), tmp_path / "out")
        state = load_state(merged.path / "state")
        learned = [name for name in state.names() if name.startswith("delta/")]
        assert "delta/model.layers.1.mlp.down_proj.weight" in learned
        assert ("delta/lm_head.weight" in learned) == (method == "fisher")
        assert all(torch.isfinite(value).all() for value in load_file(merged.path / "model.safetensors").values())

    def test_files_of_inputs_do_not_decide_by_their_order_of_tasks(self, mini: MiniSuite, tmp_path: Path) -> None:
        asked = recipe(mini.suite, "regmean", **FEW)
        plait.merge(asked, tmp_path / "one")
        plait.merge({**asked, "models": asked["models"][::-1]}, tmp_path / "two")
        one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
        assert one == two
        shutil.rmtree(tmp_path / "two")
