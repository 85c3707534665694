"""Learning: gradients against autograd through the merge, fits that resume to the same bytes, states that replay."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mini_suite
import numpy as np
import pytest
import torch
from mini_suite import MiniSuite
from torch import Tensor

import plait
from plait import CheckpointError, RecipeError
from plait.engine import Engine
from plait.evaluate.contenders import by_method
from plait.learn import loop, objectives
from plait.learn.bench import Workbench
from plait.learn.coefficients import Coefficients
from plait.learn.concrete import ConcreteAdaMerging, ConcreteTaskArithmetic
from plait.learn.data import Inputs, suite_of_recipe
from plait.learn.guard import Guard, reading
from plait.learn.learners import Session
from plait.learn.vectors import TaskVectors
from plait.methods.granules import granule_of
from plait.plan import make_plan
from plait.recipe import load_recipe
from plait.stages import Silent
from plait.state import load_state, quantised, write_state

mini = mini_suite.mini
SHORT = {"steps": 6, "batch": 4}


def recipe(mini: MiniSuite, method: str, **settings: Any) -> dict[str, Any]:
    """The suite's experts by a method that learns, as plain data."""
    made = by_method(method, mini.suite, settings)
    return {**made.model_dump(exclude_defaults=True), "data": str(mini.root / "suite.yaml")}


class Trial:
    """A session put together by hand, and the merged model's loss by autograd through the merge."""

    def __init__(self, mini: MiniSuite, folder: Path, method: str, **settings: Any) -> None:
        self.plan = make_plan(load_recipe(recipe(mini, method, **settings)))
        engine = Engine(threads=1, memory=1 << 28, device="cpu", progress=Silent())
        self.inputs = Inputs(suite_of_recipe(self.plan, "adapt"), "adapt", 0)
        self.bench = Workbench(self.plan, engine, self.inputs, self.plan.fit)
        learned = self.plan.method.learned
        assert learned is not None
        folder.mkdir(exist_ok=True)
        self.vectors = TaskVectors(self.plan, engine, folder / "vectors.bin", learned.vectors)
        self.session = Session(self.bench, self.plan.fit, 0, folder)
        self.session.ask_experts(everything=True)

    def loss(self, weights: dict[str, Tensor], rows: dict[str, list[int]]) -> Tensor:
        """Summed loss of the model with these weights, which may have a graph behind them."""
        body = self.bench.net.body
        own = {id(value): name for name, value in body.named_parameters()}
        swapped = {own[id(self.bench.places[name])]: value for name, value in weights.items()}
        batch = self.inputs.collate(self.bench.net, rows)
        loss = self.session.loss()

        class Stand(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = body

            def forward(self, net: Any) -> Tensor:
                out = net.scores(batch)
                return torch.stack([loss(task, out[task], rows[task]) for task in out]).sum()

        module = Stand()
        return torch.func.functional_call(
            module, {f"body.{name}": value for name, value in swapped.items()}, (self.bench.net,)
        )


@pytest.fixture
def trial(mini: MiniSuite, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Trial]:
    method, settings = request.param
    made = Trial(mini, tmp_path / "trial", method, **settings)
    yield made
    made.plan.library.close()


def close(found: Tensor, wanted: Tensor, limit: float = 1e-5) -> None:
    """Equal up to a share of the largest entry."""
    assert found.shape == wanted.shape
    assert float(wanted.abs().max()) > 0
    assert float((found - wanted).abs().max()) <= limit * float(wanted.abs().max())


GRANULARITIES = [("adamerging", {"granularity": g}) for g in ("task", "layer", "block", "tensor")]
KINDS = [
    ("adamerging", {"objective": "agreement"}),
    ("adamerging_pp", {"density": 0.3}),
    ("adamerging", {"forward": 8}),
]


class TestGradients:
    @pytest.mark.parametrize("trial", [*GRANULARITIES, *KINDS], indirect=True)
    def test_coefficients_against_autograd_through_the_merge(self, trial: Trial) -> None:
        learner = Coefficients(trial.bench, trial.vectors, trial.plan.fit, trial.session.loss())
        rows = trial.inputs.batch(0, 5)
        learner.pull(rows)
        lambdas = torch.full_like(learner.lambdas, 0.3).requires_grad_(True)
        group = {name: learner.groups.index(learner.group[name]) for name in learner.names}
        weights = {
            name: (trial.vectors.base(name) + lambdas[group[name]] @ trial.vectors.rows(name)).view(
                trial.vectors.shape(name)
            )
            for name in learner.names
        }
        trial.loss(weights, rows).backward()
        assert learner.lambdas.grad is not None
        assert lambdas.grad is not None
        close(learner.lambdas.grad, lambdas.grad)

    @pytest.mark.parametrize("trial", [("adamerging", {"stay": 2.0, "lr": 0.05, "clamp": False})], indirect=True)
    def test_a_step_is_adams(self, trial: Trial) -> None:
        learner = Coefficients(trial.bench, trial.vectors, trial.plan.fit, trial.session.loss())
        for step in range(2):
            learner.step(step)
        lambdas = torch.full_like(learner.lambdas, 0.3).requires_grad_(True)
        adam = torch.optim.Adam([lambdas], lr=0.05)
        for step in range(2):
            adam.zero_grad()
            weights = {
                name: (
                    trial.vectors.base(name)
                    + lambdas[learner.groups.index(learner.group[name])] @ trial.vectors.rows(name)
                ).view(trial.vectors.shape(name))
                for name in learner.names
            }
            loss = trial.loss(weights, trial.inputs.batch(step, trial.plan.fit.batch))
            (loss + 2.0 * (lambdas - 0.3).square().mean()).backward()
            adam.step()
        assert float((learner.lambdas - lambdas).detach().abs().max()) < 1e-4

    @pytest.mark.parametrize(
        ("trial", "inside"),
        [
            (("adamerging", {"lr": 0.9}), False),
            (("adamerging", {"lr": 0.9, "clamp": True}), True),
            (("adamerging", {"lr": 0.9, "protocol": "paper"}), True),
            (("tsv_adamerging", {"lr": 0.9, "protocol": "paper"}), False),
        ],
        indirect=["trial"],
    )
    def test_the_clamp_is_the_papers(self, trial: Trial, inside: bool) -> None:
        learner = Coefficients(trial.bench, trial.vectors, trial.plan.fit, trial.session.loss())
        for step in range(2):
            learner.step(step)
        low, high = float(learner.lambdas.detach().min()), float(learner.lambdas.detach().max())
        assert (low >= 0 and high <= 1) == inside

    @pytest.mark.parametrize("trial", [("concrete_task_arithmetic", {"lr": 0.1})], indirect=True)
    def test_mask_against_autograd_through_the_merge(self, trial: Trial) -> None:
        learner = ConcreteTaskArithmetic(trial.bench, trial.vectors, trial.plan.fit, trial.session.loss(), 0)
        learner.step(0)  # so that the logits are not all zero
        before = {name: value.detach().clone() for name, value in learner.mask.logits.items()}
        learner.step(1)
        logits = {name: value.clone().requires_grad_(True) for name, value in before.items()}
        weights = masked_weights(trial, learner.mask.names, logits, torch.full((3,), 0.3), 1)
        trial.loss(weights, trial.inputs.batch(1, trial.plan.fit.batch)).backward()
        close(gradients(learner.mask.logits), gradients(logits))

    @pytest.mark.parametrize(
        "trial",
        [("concrete_adamerging", {"lr": 0.1, "inner_lr": 0.2, "granularity": g}) for g in ("task", "tensor")],
        indirect=True,
    )
    def test_both_levels_against_autograd_through_the_merge(self, trial: Trial) -> None:
        learner = ConcreteAdaMerging(trial.bench, trial.vectors, trial.plan.fit, trial.session.loss(), 0)
        learner.step(0)
        before = {name: value.detach().clone() for name, value in learner.mask.logits.items()}
        state = learner.inner_optimiser.state_dict()
        names, batch = learner.mask.names, trial.plan.fit.batch
        group = {name: learner.inner.groups.index(learner.inner.group[name]) for name in names}

        lambdas = torch.full_like(learner.inner.lambdas, 0.3).requires_grad_(True)
        weights = masked_weights(trial, names, before, lambdas, 2, group)
        trial.loss(weights, trial.inputs.batch(2, batch)).backward()
        inner = torch.optim.Adam([lambdas], lr=0.2)
        inner.load_state_dict(json_free_copy(state))
        learner.step(1)
        inner.step()
        with torch.no_grad():
            lambdas.clamp_(0, 1)
        assert float((learner.inner.lambdas - lambdas).detach().abs().max()) < 1e-3  # Adam divides by what may be tiny

        logits = {name: value.clone().requires_grad_(True) for name, value in before.items()}
        weights = masked_weights(trial, names, logits, learner.inner.lambdas.detach(), 3, group)
        trial.loss(weights, trial.inputs.batch(3, batch)).backward()
        close(gradients(learner.mask.logits), gradients(logits))


def gradients(logits: dict[str, Tensor]) -> Tensor:
    """All tensors' side by side: a key's bias, say, has none but rounding, and a pooler that nothing reads has none."""
    return torch.cat([torch.zeros_like(value) if value.grad is None else value.grad for value in logits.values()])


def json_free_copy(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state with tensors of its own."""
    copied = {key: {k: v.clone() for k, v in item.items()} for key, item in state["state"].items()}
    return {"state": copied, "param_groups": state["param_groups"]}


def masked_weights(
    trial: Trial, names: list[str], logits: dict[str, Tensor], lambdas: Tensor, draw: int, group: Any = None
) -> dict[str, Tensor]:
    """θ0 + m/mean(m) · Σ λ τ with the draw of that number, from the definition."""
    found = {}
    for name in names:
        key = hashlib.sha256(f"0\0{draw}\0{name}".encode()).digest()
        random = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
        u = torch.rand(logits[name].numel(), generator=random).clamp(2.0**-24, 1 - 2.0**-24)
        mask = torch.sigmoid((torch.log(u) - torch.log1p(-u) + logits[name]) / 0.5)
        own = lambdas if group is None else lambdas[group[name]]
        values = trial.vectors.base(name) + mask / mask.mean() * (own @ trial.vectors.rows(name))
        found[name] = values.view(trial.vectors.shape(name))
    return found


class TestObjectives:
    def test_entropy_and_agreement_against_numpy(self) -> None:
        scores, expert = (np.random.default_rng(s).normal(size=(7, 5)) for s in (0, 1))

        def softmax(x: Any) -> Any:
            e = np.exp(x - x.max(1, keepdims=True))
            return e / e.sum(1, keepdims=True)

        p, q = softmax(scores / 2), softmax(expert / 2)
        assert float(objectives.entropy(torch.tensor(scores), 2.0)) == pytest.approx(-(p * np.log(p)).sum(1).mean())
        found = objectives.agreement(torch.tensor(scores), torch.tensor(expert), 2.0)
        assert float(found) == pytest.approx((q * np.log(q / p)).sum(1).mean(), rel=1e-5)

    def test_contrastive_against_numpy(self) -> None:
        values = np.random.default_rng(0).normal(size=(6, 4))
        unit = values / np.linalg.norm(values, axis=1, keepdims=True)
        scores = unit[:3] @ unit[3:].T / 0.1
        wanted = np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(scores)])
        assert float(objectives.contrastive(torch.tensor(values), 0.1)) == pytest.approx(wanted, rel=1e-5)


class TestGuard:
    expert = torch.eye(4).repeat(5, 1) * 8

    def test_a_collapse_is_seen_though_the_loss_falls(self) -> None:
        guard = Guard({"a": self.expert})
        assert not guard.judge(0, guard.read({"a": self.expert * 0.3}), {"x": torch.zeros(1)})
        swallowed = torch.zeros(20, 4)
        swallowed[:, 0] = 9
        assert guard.judge(5, guard.read({"a": swallowed}), {"x": torch.ones(1)})
        assert "the predictions of a collapse" in guard.verdict
        assert guard.best_step == 0
        assert float(guard.best_values["x"]) == 0

    def test_a_decline_is_seen(self) -> None:
        guard = Guard({"a": self.expert})
        guard.judge(0, guard.read({"a": self.expert}), {})
        rolled = self.expert.clone()
        rolled[:12] = rolled[:12].roll(1, dims=1)
        assert guard.judge(5, guard.read({"a": rolled}), {})
        assert "the divergence from the experts rose from 0.000 to" in guard.verdict

    def test_noise_is_not_a_decline(self) -> None:
        guard = Guard({"a": self.expert})
        guard.judge(0, guard.read({"a": self.expert * 0.3}), {})
        rolled = self.expert * 0.29
        assert not guard.judge(5, guard.read({"a": rolled}), {})

    def test_readings(self) -> None:
        found = reading(self.expert, self.expert)
        assert found.agreement == 1
        assert found.divergence == pytest.approx(0, abs=1e-6)
        assert found.spread == pytest.approx(1)


class TestInputs:
    def test_batches_are_functions_of_the_step(self, mini: MiniSuite) -> None:
        first, again = (Inputs(mini.suite, "adapt", 3) for _ in range(2))
        assert [first.batch(s, 7) for s in range(9)] == [again.batch(s, 7) for s in reversed(range(9))][::-1]
        assert first.batch(0, 7) != Inputs(mini.suite, "adapt", 4).batch(0, 7)

    def test_an_epoch_sees_every_row_once_and_never_a_watched_one(self, mini: MiniSuite) -> None:
        inputs = Inputs(mini.suite, "adapt", 0)
        count = len(inputs.learn["tone"])
        rows = [row for step in range(count) for row in inputs.batch(step, 3)["tone"]]
        assert sorted(rows) == sorted(inputs.learn["tone"].tolist() * 3)
        assert not set(rows) & set(inputs.watch["tone"].tolist())
        assert len(inputs.watch["tone"]) + count == mini_suite.TEST


def files(folder: Path) -> dict[str, str]:
    """Hash of every file that counts."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "timing.json"
    }


METHODS = [
    ("adamerging", {}),
    ("adamerging_pp", {"density": 0.4}),
    ("concrete_task_arithmetic", {"lr": 0.1}),
    ("concrete_adamerging", {"lr": 0.1, "finetune_steps": 3}),
]


class TestStates:
    @pytest.mark.parametrize(("method", "settings"), METHODS)
    def test_a_state_replays_without_data(
        self, mini: MiniSuite, tmp_path: Path, method: str, settings: dict[str, Any]
    ) -> None:
        asked = recipe(mini, method, **SHORT, **settings)
        plait.merge(asked, tmp_path / "fitted")
        plait.fit(asked, tmp_path / "state")
        assert files(tmp_path / "state") == files(tmp_path / "fitted" / "state")
        without = {key: value for key, value in asked.items() if key not in ("data", "fit")}
        plait.merge(without, tmp_path / "replayed", state=tmp_path / "state")
        plait.merge(without, tmp_path / "again", state=tmp_path / "fitted" / "state", threads=2, memory="64MB")
        weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("fitted", "replayed", "again")]
        assert weights[0] == weights[1] == weights[2]
        assert not list(tmp_path.glob(".*"))

    def test_learned_weights_are_those_that_the_fit_saw(self, mini: MiniSuite, tmp_path: Path) -> None:
        """What a fit ends with, merged by the streaming run, answers as the fit's own model did."""
        from plait.evaluate.measure import Bench
        from plait.evaluate.subjects import Options, Subject

        asked = recipe(mini, "concrete_adamerging", steps=10, lr=0.3, finetune_steps=8, finetune_lr=0.05, guard=False)
        merged = plait.merge(asked, tmp_path / "out")
        state = load_state(merged.path / "state")
        watched = state.facts["summary"]["tasks"]
        suite = adapt_as_test(mini, tmp_path)
        found = Bench(suite, Options(use_cache=False)).evaluate(Subject.model(suite, str(merged.path)))
        inputs = Inputs(mini.suite, "adapt", 0)
        for task, result in found.tasks.items():
            answers = expert_predictions(mini, suite, task)
            rows = inputs.watch[task]
            agreed = np.mean([result.predictions[row] == answers[row] for row in rows])
            assert agreed == pytest.approx(watched[task]["agreement"], abs=1e-6)

    @pytest.mark.parametrize(("method", "settings"), METHODS)
    def test_a_fit_that_is_killed_goes_on_to_the_same_bytes(
        self, mini: MiniSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, settings: dict[str, Any]
    ) -> None:
        asked = recipe(mini, method, **SHORT, **settings)
        plait.fit(asked, tmp_path / "whole")
        monkeypatch.setattr(loop, "_SAVE_SECONDS", 0.0)
        for kill in (2, 4, 8):
            seen = 0
            saved = loop._save

            def dying(*given: Any, kill: int = kill, saved: Any = saved) -> None:
                nonlocal seen
                saved(*given)
                seen += 1
                if seen == kill:
                    raise KeyboardInterrupt

            monkeypatch.setattr(loop, "_save", dying)
            out = tmp_path / f"killed{kill}"
            total = SHORT["steps"] + settings.get("finetune_steps", 0)
            if kill <= total:
                with pytest.raises(KeyboardInterrupt):
                    plait.fit(asked, out)
                assert not out.exists()
            monkeypatch.setattr(loop, "_save", saved)
            plait.fit(asked, out, resume=True)
            assert files(out) == files(tmp_path / "whole")

    def test_constant_coefficients_are_task_arithmetic(self, mini: MiniSuite, tmp_path: Path) -> None:
        asked = recipe(mini, "adamerging", steps=1, lr=1e-30, batch=2)
        plait.merge(asked, tmp_path / "learned")
        plait.merge(mini.suite.recipe("task_arithmetic", {"weight": 0.3}), tmp_path / "plain")
        one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("learned", "plain"))
        assert one == other

    def test_constant_parts_are_tsv_m(self, mini: MiniSuite, tmp_path: Path) -> None:
        from safetensors.torch import load_file

        plait.merge(recipe(mini, "tsv_adamerging", steps=1, lr=1e-30, batch=2), tmp_path / "learned")
        plait.merge(mini.suite.recipe("tsv_m"), tmp_path / "plain")
        one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("learned", "plain"))
        assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)

    def test_a_mask_of_zeros_is_task_arithmetic(self, mini: MiniSuite, tmp_path: Path) -> None:
        from safetensors.torch import load_file

        asked = recipe(mini, "concrete_task_arithmetic", steps=1, lr=1e-30, batch=2)
        plait.merge(asked, tmp_path / "learned")
        plait.merge(mini.suite.recipe("task_arithmetic", {"weight": 0.3}), tmp_path / "plain")
        one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("learned", "plain"))
        assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)

    @pytest.mark.parametrize("kind", ["mean", "sample", "binary"])
    def test_masks_at_evaluation(self, mini: MiniSuite, tmp_path: Path, kind: str) -> None:
        from safetensors.torch import load_file

        asked = recipe(mini, "concrete_task_arithmetic", **SHORT, lr=0.3)
        plait.fit(asked, tmp_path / "state")
        plait.merge({**asked, "parameters": {"eval_mask": kind}}, tmp_path / "out", state=tmp_path / "state")
        state = load_state(tmp_path / "state")
        name = "encoder.layer.0.output.dense.weight"
        stored, scale = state.tensor(f"mask/{name}"), state.tensor(f"mask_scale/{name}")
        assert stored is not None
        assert scale is not None
        assert stored.dtype == torch.int8
        logits = (stored.float() * scale).double()
        models = [load_file(folder_of(mini, task) / "model.safetensors") for task in sorted(mini.suite.tasks)]
        base = load_file(mini.base / "model.safetensors")[name].double()
        total = 0.3 * torch.stack([find(model, name).double() - base for model in models]).sum(0)
        merged = load_file(tmp_path / "out" / "model.safetensors")[name].double()
        if kind == "sample":
            assert not torch.allclose(merged - base, total, atol=1e-3)
            return
        mask = draws(logits) if kind == "mean" else (logits >= 0).double()
        assert torch.allclose(merged, base + mask / mask.mean() * total, atol=2e-3 if kind == "mean" else 1e-5)

    def test_quantised_logits(self) -> None:
        values = torch.linspace(-3, 2, 999)
        stored, scale = quantised(values)
        assert float((stored.float() * scale - values).abs().max()) <= 3 / 254 + 1e-6
        assert float(quantised(torch.zeros(4))[1]) == 0

    def test_writing_twice_gives_the_same_bytes(self, tmp_path: Path) -> None:
        numbers = {"b": torch.arange(3.0), "a": torch.zeros(2, 2, dtype=torch.int8)}
        texts, maps = dict.fromkeys(("method", "paper", "sees", "split"), "x"), ("models", "vectors", "fit", "data")
        facts = {**texts, **{key: {} for key in (*maps, "summary")}, "tasks": ["a"], "seed": 0}
        for name in ("one", "two"):
            write_state(tmp_path / name, facts, numbers, overwrite=False, scratch=tmp_path / "s")
            numbers = dict(reversed(numbers.items()))
        assert files(tmp_path / "one") == files(tmp_path / "two")


class TestComposed:
    def test_spelled_out_it_is_the_preset(self, mini: MiniSuite, tmp_path: Path) -> None:
        asked = recipe(mini, "adamerging_pp", **SHORT, density=0.4)
        spelled = {key: value for key, value in asked.items() if key not in ("merge_method", "parameters")}
        spelled |= {"transforms": [{"trim": {"density": 0.4}}, "agree"], "combine": "adamerging"}
        plait.merge(asked, tmp_path / "preset")
        plait.merge(spelled, tmp_path / "spelled")
        one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("preset", "spelled"))
        assert one == other

    def test_awd_before_adamerging(self, mini: MiniSuite, tmp_path: Path) -> None:
        asked = recipe(mini, "awd_adamerging", **SHORT)
        merged = plait.merge(asked, tmp_path / "preset")
        spelled = {key: value for key, value in asked.items() if key not in ("merge_method", "parameters")}
        plait.merge({**spelled, "transforms": ["awd"], "combine": "adamerging"}, tmp_path / "spelled")
        one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("preset", "spelled"))
        assert one == other
        told = json.loads((merged.path / "plait.json").read_text())["survey"]
        assert told["cosine_before"] > 0
        assert "nothing to disentangle" in merged.notes[-1]

    def test_the_mask_of_a_composed_method_is_chosen_at_the_merge(self, mini: MiniSuite, tmp_path: Path) -> None:
        asked = recipe(mini, "concrete_task_arithmetic", **SHORT, lr=0.3)
        spelled = {key: value for key, value in asked.items() if key != "merge_method"}
        spelled |= {"transforms": [{"trim": {"density": 0.4}}], "combine": "concrete_task_arithmetic"}
        plait.fit(spelled, tmp_path / "state")
        binary = {**spelled, "combine": {"concrete_task_arithmetic": {"eval_mask": "binary"}}}
        plait.merge(binary, tmp_path / "binary", state=tmp_path / "state")
        other = {**spelled, "transforms": [{"trim": {"density": 0.5}}]}
        with pytest.raises(RecipeError, match="was learned with the parameters"):
            plait.merge(other, tmp_path / "other", state=tmp_path / "state")

    def test_what_comes_after_learning_is_refused(self, mini: MiniSuite, tmp_path: Path) -> None:
        asked = recipe(mini, "adamerging", **SHORT)
        with pytest.raises(RecipeError, match="adamerging learns, and would not see what follows; remove finish"):
            plait.merge({**asked, "finish": [{"scale": {"lambda": 2}}]}, tmp_path / "out")
        spelled = {key: value for key, value in asked.items() if key != "merge_method"}
        with pytest.raises(RecipeError, match="would not see what follows"):
            plait.merge({**spelled, "combine": "adamerging", "finish": ["scale"]}, tmp_path / "out")
        with pytest.raises(RecipeError, match="awd must be the first transform"):
            plait.merge({**spelled, "transforms": ["agree", "awd"], "combine": "adamerging"}, tmp_path / "out")

    def test_a_callable_objective(self, mini: MiniSuite, tmp_path: Path) -> None:
        asked = recipe(mini, "adamerging", steps=4, batch=4, lr=0.05, guard=False)
        down = plait.fit(asked, tmp_path / "down", objective=lambda task, scores: scores.mean())
        up = plait.fit(asked, tmp_path / "up", objective=lambda task, scores: -scores.mean())
        first, last = down.facts["history"]["loss"][0], up.facts["history"]["loss"][0]
        assert first == pytest.approx(-last, rel=1e-5)
        assert down.facts["objective"] == "<lambda>"
        assert files(tmp_path / "down")["state.safetensors"] != files(tmp_path / "up")["state.safetensors"]

    def test_self_positioning_learns_from_pairs(self, mini: MiniSuite, tmp_path: Path) -> None:
        asked = recipe(mini, "self_positioning", steps=8, batch=6, lr=0.05)
        asked["data"] = {
            task: {"path": str(mini.root / "data" / "pair-adapt.jsonl"), "input": ["first", "second"]}
            for task in mini.suite.tasks
        }
        state = plait.fit(asked, tmp_path / "state")
        losses = state.facts["history"]["loss"]
        assert len(losses) == 8
        found = state.tensor("coefficients/all")
        assert found is not None
        assert found.shape == (3,)
        assert not torch.allclose(found, torch.full((3,), 0.3))


class TestOptions:
    def test_the_papers_protocol(self, mini: MiniSuite, tmp_path: Path) -> None:
        state = plait.fit(recipe(mini, "adamerging", protocol="paper", steps=3), tmp_path / "state")
        facts = state.facts
        assert (facts["split"], facts["fit"]["objective"], facts["fit"]["guard"]) == ("test", "entropy", False)
        assert (facts["fit"]["lr"], facts["fit"]["steps"]) == (1e-3, 3)
        assert facts["summary"]["kept_step"] == 3
        asked = {
            **recipe(mini, "adamerging"),
            "fit": {"protocol": "paper"},
            "data": dict.fromkeys(mini.suite.tasks, "x"),
        }
        with pytest.raises(RecipeError, match="adapts on a suite's test inputs, so data: must name a suite"):
            plait.fit(asked, tmp_path / "other")

    def test_bfloat16_learns_about_the_same(self, mini: MiniSuite, tmp_path: Path) -> None:
        found = []
        for precision in ("float32", "bfloat16"):
            asked = recipe(mini, "adamerging", steps=10, batch=8, granularity="task", precision=precision, guard=False)
            values = plait.fit(asked, tmp_path / precision).tensor("coefficients/all")
            assert values is not None
            found.append(values)
        assert torch.allclose(found[0], found[1], atol=0.1)
        assert not torch.equal(found[0], found[1])
        assert not torch.allclose(found[0], torch.full((3,), 0.3), atol=0.1)

    def test_tasks_in_parts_add_up(self, mini: MiniSuite, tmp_path: Path) -> None:
        found = []
        for forward in (128, 8):
            asked = recipe(mini, "adamerging", **SHORT, forward=forward)
            values = plait.fit(asked, tmp_path / str(forward)).tensor(
                "coefficients/encoder.layer.0.output.dense.weight"
            )
            assert values is not None
            found.append(values)
        assert torch.allclose(found[0], found[1], atol=1e-3)

    def test_the_guard_keeps_the_best_state(self, mini: MiniSuite, tmp_path: Path) -> None:
        asked = recipe(mini, "adamerging", steps=40, batch=4, lr=1.0, clamp=False)
        state = plait.fit(asked, tmp_path / "state", objective=lambda task, scores: -scores.std())
        summary = state.facts["summary"]
        assert summary["verdict"]
        assert summary["steps_taken"] < 40
        assert summary["kept_step"] == summary["best_step"] < summary["steps_taken"]


class TestCommands:
    def test_fit_inspect_merge(
        self, mini: MiniSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        import sys

        from plait import cli

        def call(*words: object) -> str:
            monkeypatch.setattr(sys, "argv", ["plait", *map(str, words)])
            cli.main()
            return capsys.readouterr().out

        (tmp_path / "recipe.json").write_text(
            json.dumps(recipe(mini, "concrete_adamerging", **SHORT, finetune_steps=5, guard=False))
        )
        shown = call("fit", tmp_path / "recipe.json", tmp_path / "state", "--quiet")
        assert shown == call("inspect", tmp_path / "state")
        for words in ("concrete_adamerging", "expert masked alone agrees", "coefficients of", "masks of", "tone"):
            assert words in " ".join(shown.split())
        data = json.loads(call("inspect", tmp_path / "state", "--json"))
        assert set(data["masks"]) == {name for name in data["coefficients"] if name in data["masks"]}
        assert len(data["history"]["loss"]) == SHORT["steps"] + 5
        call("merge", tmp_path / "recipe.json", tmp_path / "out", "--state", tmp_path / "state", "--quiet")
        assert files(tmp_path / "out" / "state") == files(tmp_path / "state")

    def test_without_a_recipe_file(
        self, mini: MiniSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        import sys

        from plait import cli

        experts = [part for task in mini.suite.tasks for part in ("-e", f"{task}={folder_of(mini, task)}")]
        words = ["merge", "-m", "adamerging", "--base", mini.base, *experts, "--data", mini.root / "suite.yaml",
                 "-s", "steps=3", tmp_path / "out", "-q"]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["plait", *map(str, words)])
        cli.main()
        assert (tmp_path / "out" / "state" / "state.json").is_file()
        assert json.loads((tmp_path / "out" / "plait.json").read_text())["learned"]["fit"]["steps"] == 3


class TestErrors:
    def ask(self, mini: MiniSuite, out: Path, change: dict[str, Any], kind: type[Exception] = RecipeError) -> str:
        asked = {**recipe(mini, "adamerging", **SHORT), **change}
        with pytest.raises(kind) as caught:
            plait.merge(asked, out / "out")
        assert not (out / "out").exists()
        return str(caught.value)

    def test_no_data(self, mini: MiniSuite, tmp_path: Path) -> None:
        text = self.ask(mini, tmp_path, {"data": None})
        assert "adamerging learns from unlabeled inputs, and the recipe has no data" in text
        assert "--state" in text

    def test_a_task_without_inputs(self, mini: MiniSuite, tmp_path: Path) -> None:
        text = self.ask(mini, tmp_path, {"data": {"tone": "x.csv", "count": "y.csv"}})
        assert "no inputs for the expert 'pair'; add data: {pair: …}" in text

    def test_an_unknown_task(self, mini: MiniSuite, tmp_path: Path) -> None:
        text = self.ask(mini, tmp_path, {"data": {"tones": "x.csv"}})
        assert "no expert is called 'tones'; did you mean 'tone'?" in text

    def test_a_missing_head(self, mini: MiniSuite, tmp_path: Path) -> None:
        data = {task: {"path": str(mini.root / "data" / "count-adapt.csv")} for task in mini.suite.tasks}
        text = self.ask(mini, tmp_path, {"data": data}, CheckpointError)
        assert "pair" in text
        assert "brings no head of its own; name the head's file with head:" in text

    def test_inputs_of_another_kind(self, mini: MiniSuite, tmp_path: Path) -> None:
        from PIL import Image

        for index in range(4):
            (tmp_path / "images").mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
        data = {task: str(tmp_path / "images") for task in mini.suite.tasks}
        text = self.ask(mini, tmp_path, {"data": data}, CheckpointError)
        assert "are images, but the model reads texts" in text

    def test_a_head_of_another_width(self, mini: MiniSuite, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        save_file({"weight": torch.zeros(4, 7), "bias": torch.zeros(4)}, tmp_path / "narrow.safetensors")
        data = {task: str(mini.root / "data" / "count-adapt.csv") for task in mini.suite.tasks}
        changed = {**data, "pair": {"path": data["pair"], "head": str(tmp_path / "narrow.safetensors")}}
        text = self.ask(mini, tmp_path, {"data": changed}, CheckpointError)
        assert "reads 7 features, but the model gives 32" in text

    def test_a_loss_that_is_no_number(self, mini: MiniSuite, tmp_path: Path) -> None:
        asked = recipe(mini, "adamerging", **SHORT)
        with pytest.raises(RecipeError, match=r"step 1: the loss of count is not a number \(nan\)"):
            plait.fit(asked, tmp_path / "state", objective=lambda task, scores: scores.mean() * float("nan"))
        assert not (tmp_path / "state").exists()

    def test_fit_options(self, mini: MiniSuite, tmp_path: Path) -> None:
        assert "no fit option 'step'; did you mean 'steps'?" in self.ask(mini, tmp_path, {"fit": {"step": 3}})
        assert "steps stands under fit:" in self.ask(mini, tmp_path, {"fit": {}, "parameters": {"steps": 3}})
        text = self.ask(mini, tmp_path, {"merge_method": "ties", "parameters": {}})
        assert "ties learns nothing; remove fit:" in text

    def test_states_that_do_not_fit(self, mini: MiniSuite, tmp_path: Path) -> None:
        asked = recipe(mini, "adamerging", **SHORT)
        plait.fit(asked, tmp_path / "state")
        state = tmp_path / "state"
        with pytest.raises(RecipeError, match="was learned for adamerging, not for concrete_task_arithmetic"):
            plait.merge(recipe(mini, "concrete_task_arithmetic"), tmp_path / "out", state=state)
        with pytest.raises(RecipeError, match="ties learns nothing, so it takes no state"):
            plait.merge(mini.suite.recipe("ties"), tmp_path / "out", state=state)
        fewer = {**asked, "models": asked["models"][:2]}
        with pytest.raises(RecipeError, match="was learned for the experts count, pair, tone"):
            plait.merge(fewer, tmp_path / "out", state=state)
        other = json.loads((state / "state.json").read_text())
        other["models"]["tone"] = "0" * 64
        (state / "state.json").write_text(json.dumps(other))
        with pytest.raises(CheckpointError, match="was learned on other weights of tone"):
            plait.merge(asked, tmp_path / "out", state=state)
        (state / "state.json").write_text("{")
        with pytest.raises(CheckpointError, match="it is not a state"):
            plait.merge(asked, tmp_path / "out", state=state)
        with pytest.raises(CheckpointError, match="no such folder; make a state with: plait fit"):
            plait.merge(asked, tmp_path / "out", state=tmp_path / "nowhere")


def draws(logits: Tensor) -> Tensor:
    """The mean of many draws of the Concrete distribution."""
    u = torch.rand((4000, 1), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    flat = logits.reshape(-1)
    parts = [torch.sigmoid((torch.logit(u) + part) / 0.5).mean(0) for part in flat.split(512)]
    return torch.cat(parts).view(logits.shape)


def folder_of(mini: MiniSuite, task: str) -> Path:
    return Path(mini.suite.place(mini.suite.tasks[task].expert))


def find(model: dict[str, Tensor], name: str) -> Tensor:
    return model[name] if name in model else model[f"bert.{name}"]


def adapt_as_test(mini: MiniSuite, folder: Path) -> Any:
    """The suite with its adapt inputs where tests look."""
    from plait.suites.definition import suite_of

    data = {
        "name": "adapted", "base": str(mini.base), "pooling": "mean", "max_length": 16,
        "tasks": {
            task: {
                **entry.model_dump(exclude_none=True, exclude_defaults=True),
                "expert": str(folder_of(mini, task)),
                "data": {"test": entry.data["adapt"].model_dump(exclude_none=True, exclude_defaults=True)},
            }
            for task, entry in mini.suite.tasks.items()
        },
    }  # fmt: skip
    del folder
    return suite_of(data, mini.root)


def expert_predictions(mini: MiniSuite, suite: Any, task: str) -> list[int]:
    from plait.evaluate.measure import Bench
    from plait.evaluate.subjects import Options

    return Bench(suite, Options(use_cache=False)).expert(task).predictions


def test_vectors_leave_out_what_no_expert_changes(mini: MiniSuite, tmp_path: Path) -> None:
    trial = Trial(mini, tmp_path / "t", "adamerging")
    assert trial.vectors.names
    for name in trial.vectors.names:
        assert torch.count_nonzero(trial.vectors.rows(name))
    plan = trial.plan
    for tensor in plan.merged[:4]:
        block = trial.bench.engine.block(tensor, 0)
        wanted = torch.cat([block.deltas(piece) for piece in tensor.grid], dim=1)
        assert torch.equal(trial.vectors.rows(tensor.key), wanted)
    assert granule_of(plan.merged[0].key, "model") == ""
    plan.library.close()
    shutil.rmtree(tmp_path / "t")
