"""AWD against full-size descent, its identities, its guard, and the same result from a folder and from memory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import reference_awd as ref
import torch
from safetensors.torch import load_file

import plait
from plait.errors import RecipeError
from plait.methods import Block, get_method
from plait.methods.awd import AwdState, diagnostics, subtract, survey_awd
from plait.methods.awd_descent import NEARLY_ORTHOGONAL, Settings
from plait.methods.contract import parameters_of
from plait.methods.granules import Granularity, granule_of
from plait.methods.memory import InMemory
from plait.methods.stream import GRAIN

AWD = get_method("awd")
SHAPES = {
    "embeddings.table": (9, 7),
    "encoder.layer.0.attention.query": (6, 5),
    "encoder.layer.0.attention.value": (6, 5),
    "encoder.layer.0.norm": (5,),
    "encoder.layer.1.attention.query": (6, 5),
    "norm.empty": (0,),
}
Tensors = dict[str, torch.Tensor]


def vectors(count: int, numel: int = 60, shared: float = 0.6, seed: int = 0) -> np.ndarray:
    """Task vectors [K, n] with something in common."""
    random = np.random.default_rng(seed)
    return 0.02 * (random.normal(size=(count, numel)) + shared * random.normal(size=numel))


def experts_of(count: int, shared: float = 0.6) -> tuple[Tensors, list[Tensors]]:
    """A base and experts of several tensors, in float64."""
    base, experts = {}, [{} for _ in range(count)]
    for i, (name, shape) in enumerate(SHAPES.items()):
        base[name] = torch.from_numpy(np.random.default_rng(90 + i).normal(size=shape))
        numel = math.prod(shape)
        for expert, tau in zip(experts, (1 + i) * vectors(count, numel, shared, seed=i), strict=True):
            expert[name] = base[name] + torch.from_numpy(tau).reshape(shape)
    return base, experts


def state_of(base: Tensors, experts: list[Tensors], **params: Any) -> AwdState:
    """The survey on tensors in memory."""
    tasks = [f"expert{k:03d}" for k in range(len(experts))]
    blocks = {name: Block.of([e[name] for e in experts], base[name], name=name, tasks=tasks) for name in base}
    state = survey_awd(InMemory(blocks, AWD.keywords(params)))
    assert state is not None
    return state


def left_of(taus: np.ndarray, **params: Any) -> np.ndarray:
    """τ_k − δ of vectors that are one tensor, [K, n]."""
    block = Block.of([torch.from_numpy(tau) for tau in taus], torch.zeros(taus.shape[1], dtype=torch.float64))
    return subtract(block, block.deltas, **params).gather().numpy()


def close(got: np.ndarray, want: np.ndarray, bound: float = 1e-9) -> bool:
    return bool(np.abs(got - want).max(initial=0) <= bound * max(float(np.abs(want).max(initial=0)), 1e-12))


class TestReference:
    @pytest.mark.parametrize("count", [2, 3, 5])
    @pytest.mark.parametrize("alpha", [0.0, 0.1])
    def test_the_gradient_is_that_of_the_loss(self, count: int, alpha: float) -> None:
        taus = 50 * vectors(count, numel=8)
        delta = taus.mean(0) * 0.3 + 0.1 * np.random.default_rng(5).normal(size=8)
        step = 1e-6
        numeric = [
            (ref.loss(taus, delta + step * axis, alpha) - ref.loss(taus, delta - step * axis, alpha)) / (2 * step)
            for axis in np.eye(8)
        ]
        np.testing.assert_allclose(ref.gradient(taus, delta, alpha), numeric, rtol=1e-6, atol=1e-8)


class TestGradientDescent:
    @pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
    @pytest.mark.parametrize("init", ["zeros", "mean"])
    @pytest.mark.parametrize("alpha", [0.0, 0.1, 0.3])
    def test_in_the_span_is_descent_on_whole_vectors(self, count: int, init: str, alpha: float) -> None:
        taus = vectors(count, seed=count)
        want = taus - ref.redundant(taus, init=init, alpha=alpha)
        assert close(left_of(taus, init=init, alpha=alpha), want)

    @pytest.mark.parametrize("init", ["zeros", "mean"])
    @pytest.mark.parametrize(
        "odd",
        [
            [0, 1, 1],  # rows of three vectors: a duplicate
            [0, 1, 1, -1],  # and an expert that did not move
            [0, -1, -1],
            [0, 0, 0],
            [0, 0],
            [-1, -1],
        ],
        ids=str,
    )
    def test_zero_and_duplicate_experts(self, init: str, odd: list[int]) -> None:
        three = vectors(3, seed=8)
        taus = np.stack([three[i] if i >= 0 else np.zeros(60) for i in odd])
        # Vectors on one line sit on the ridge of |cos| = 1: whole vectors drift off it by rounding, a span cannot.
        want = taus - ref.redundant(taus, init=init, steps=100)
        got = left_of(taus, init=init, steps=100)
        assert np.isfinite(got).all()
        assert np.abs(got - want).max() <= 1e-9 * 0.05

    def test_vectors_that_depend_on_each_other_keep_small_coefficients(self) -> None:
        """On a line every cosine is ±1: what rounding does to coefficients that cancel must not grow."""
        base = {"w": torch.zeros(1, dtype=torch.float64)}
        experts = [{"w": torch.tensor([x], dtype=torch.float64)} for x in (-0.0066, 0.032, 0.0051, 0)]
        record = state_of(base, experts, init="mean", alpha=0.3).found[""]
        assert max(map(abs, record.coefficients)) < 1
        assert record.multipliers[-1] == 1

    def test_paper_scale_takes_alpha_and_beta_as_they_are(self) -> None:
        taus = 30 * vectors(3)
        options = {"alpha": 0.02, "beta": 0.05, "steps": 40, "scale": "paper"}
        want = taus - ref.redundant(taus, **options)
        assert close(left_of(taus, **options), want)
        assert not close(left_of(taus, **{**options, "scale": "relative"}), want, 1e-3)

    def test_relative_scale_does_not_see_the_length(self) -> None:
        taus = vectors(4)
        np.testing.assert_allclose(left_of(1000 * taus), 1000 * left_of(taus), rtol=1e-9)

    def test_a_large_tensor_takes_several_pieces(self) -> None:
        taus = vectors(2, GRAIN + 77)
        assert close(left_of(taus, steps=20), taus - ref.redundant(taus, steps=20))

    def test_lowers_the_cosines(self) -> None:
        record = state_of(*experts_of(4)).found[""]
        assert record.cosine_after < 0.7 * record.cosine_before
        assert record.loss_last < record.loss_first
        assert not record.diverged

    def test_equal_weights_are_task_arithmetic_with_other_weights(self) -> None:
        base, experts = experts_of(4)
        multipliers = state_of(base, experts).found[""].multipliers
        assert all(abs(1 - m) > 0.01 for m in multipliers)
        want = get_method("task_arithmetic")(experts, base, weight=[0.3 * m for m in multipliers], lambda_=0.7)
        got = AWD(experts, base, weight=0.3, lambda_=0.7)
        for name in base:
            torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12)


class TestAdam:
    @pytest.mark.parametrize("count", [1, 2, 4])
    @pytest.mark.parametrize("init", ["zeros", "mean"])
    @pytest.mark.parametrize("scale", ["relative", "paper"])
    def test_streamed_is_adam_on_whole_vectors(self, count: int, init: str, scale: str) -> None:
        taus = vectors(count, seed=count)
        options = {"optimizer": "adam", "init": init, "scale": scale, "steps": 60, "beta": 0.003}
        assert close(left_of(taus, **options), taus - ref.redundant(taus, **options))

    def test_a_large_tensor_takes_several_pieces(self) -> None:
        taus = vectors(2, GRAIN + 77)
        options = {"optimizer": "adam", "steps": 3}
        assert close(left_of(taus, **options), taus - ref.redundant(taus, **options))

    def test_leaves_the_span(self) -> None:
        taus = vectors(3)
        delta = (taus - left_of(taus, optimizer="adam", steps=50))[0]
        inside = np.linalg.lstsq(taus.T, delta, rcond=None)[0] @ taus
        assert np.linalg.norm(delta - inside) > 0.01 * np.linalg.norm(delta)

    def test_lowers_the_cosines(self) -> None:
        record = state_of(*experts_of(4), optimizer="adam", steps=100).found[""]
        assert record.cosine_after < record.cosine_before
        assert record.loss_last < record.loss_first

    def test_experts_that_did_not_move_leave_the_base(self) -> None:
        base, _ = experts_of(1)
        merged = AWD([base, base], base, optimizer="adam", init="mean", steps=3)
        assert all(torch.equal(merged[name], base[name]) for name in base)


class TestGranules:
    @pytest.mark.parametrize("optimizer", ["gd", "adam"])
    @pytest.mark.parametrize("granularity", ["model", "layer", "block", "tensor"])
    def test_each_granule_is_one_vector(self, granularity: Granularity, optimizer: str) -> None:
        base, experts = experts_of(3)
        options: dict[str, Any] = {"optimizer": optimizer, "steps": 30}
        got = AWD(experts, base, weight=[0.3, 0.5, 0.1], granularity=granularity, **options)
        groups: dict[str, list[str]] = {}
        for name in SHAPES:
            groups.setdefault(granule_of(name, granularity), []).append(name)
        assert len(groups) == {"model": 1, "layer": 4, "block": 5, "tensor": 6}[granularity]
        for names in groups.values():
            taus = np.stack([np.concatenate([(e[n] - base[n]).reshape(-1) for n in names]) for e in experts])
            left = taus - ref.redundant(taus, **options) if taus.size else taus
            want = np.concatenate([base[n].reshape(-1) for n in names]) + np.array([0.3, 0.5, 0.1]) @ left
            assert close(np.concatenate([got[n].reshape(-1) for n in names]), want)

    @pytest.mark.parametrize(
        ("name", "layer", "block"),
        [
            ("encoder.layer.3.attention.self.query.weight", "encoder.layer.3", "encoder.layer.3.attention"),
            ("vision_model.encoder.layers.11.mlp.fc1.bias", "vision_model.encoder.layers.11",
             "vision_model.encoder.layers.11.mlp"),
            ("model.layers.3.self_attn.q_proj.weight", "model.layers.3", "model.layers.3.self_attn"),
            ("model.layers.3.mlp.experts.5.w1.weight", "model.layers.3", "model.layers.3.mlp"),
            ("encoder.block.0.layer.1.DenseReluDense.wi.weight", "encoder.block.0", "encoder.block.0.layer.1"),
            ("embeddings.cls_token", "embeddings", "embeddings"),
            ("layernorm.weight", "layernorm", "layernorm"),
            ("h.0", "h.0", "h.0"),
            ("h.0.weight", "h.0", "h.0.weight"),
        ],
    )  # fmt: skip
    def test_are_read_off_the_name(self, name: str, layer: str, block: str) -> None:
        assert granule_of(name, "model") == ""
        assert granule_of(name, "layer") == layer
        assert granule_of(name, "block") == block
        assert granule_of(name, "tensor") == name


class TestDiagnostics:
    def test_are_small_json(self) -> None:
        found = diagnostics(state_of(*experts_of(3), granularity="tensor"))
        assert json.loads(json.dumps(found)) == found
        assert (found["granules"], found["unchanged"], found["diverged"], found["notes"]) == (6, 1, 0, [])
        assert set(found["multipliers"]) == {"expert000", "expert001", "expert002"}

    @pytest.mark.parametrize("optimizer", ["gd", "adam"])
    def test_numbers_are_those_of_the_vectors(self, optimizer: str) -> None:
        taus = vectors(3, seed=4)
        base = {"w": torch.zeros(60, dtype=torch.float64)}
        options: dict[str, Any] = {"optimizer": optimizer, "steps": 50, "alpha": 0.2}
        record = state_of(base, [{"w": torch.from_numpy(tau)} for tau in taus], **options).found[""]
        delta, unit = ref.redundant(taus, **options), math.sqrt((taus**2).sum() / 3)
        norm = float(np.linalg.norm(taus, axis=1).mean())
        assert record.norm == pytest.approx(norm)
        assert record.length == pytest.approx(np.linalg.norm(delta) / norm)
        assert record.cosine_before == pytest.approx(ref.loss(taus, np.zeros(60), 0))
        assert record.cosine_after == pytest.approx(ref.loss(taus, delta, 0))
        assert record.loss_first == pytest.approx(ref.loss(taus / unit, np.zeros(60), 0.2))
        assert record.loss_last == pytest.approx(ref.loss(taus / unit, delta / unit, 0.2))
        nearest = np.linalg.lstsq(taus.T, delta, rcond=None)[0]
        assert record.multipliers == pytest.approx(1 - 3 * nearest)

    def test_say_that_there_is_nothing_to_disentangle(self) -> None:
        base = {"w": torch.zeros(20000, dtype=torch.float64)}
        experts = [{"w": torch.from_numpy(tau)} for tau in vectors(4, 20000, shared=0)]
        found = diagnostics(state_of(base, experts))
        assert found["cosine_before"] < NEARLY_ORTHOGONAL
        assert found["diverged"] == 0
        assert "nothing to disentangle" in found["notes"][0]

    def test_paper_scale_on_short_vectors_diverges_and_says_so(self) -> None:
        """Layer norms and biases: the absolute step is many times their task vector."""
        random = np.random.default_rng(3)
        base = {f"layers.{i}.norm": torch.ones(32, dtype=torch.float64) for i in range(4)}
        experts = [{n: b + 0.002 * torch.from_numpy(random.normal(size=32)) for n, b in base.items()} for _ in range(4)]
        found = diagnostics(state_of(base, experts, granularity="tensor", scale="paper"))
        assert found["diverged"] == 4
        assert found["length"] > 10
        assert "scale: relative" in found["notes"][-1]
        assert diagnostics(state_of(base, experts, granularity="tensor"))["diverged"] == 0

    def test_no_experts_that_moved_and_one_expert_have_their_sentences(self) -> None:
        base, experts = experts_of(1)
        assert "shares nothing" in diagnostics(state_of(base, experts))["notes"][0]
        assert "no expert differs" in diagnostics(state_of(base, [base, base]))["notes"][0]

    @pytest.mark.parametrize("optimizer", ["gd", "adam"])
    def test_what_is_no_number_is_refused(self, optimizer: str) -> None:
        base, experts = experts_of(3)
        with pytest.raises(RecipeError, match=r"left the numbers in the model; set a smaller beta"):
            AWD(experts, base, beta=1e300, optimizer=optimizer, steps=5)


class TestParameters:
    def test_are_alike_in_method_transform_and_settings(self) -> None:
        own = parameters_of(subtract)
        assert {name: AWD.parameters[name] for name in own} == own
        assert set(AWD.parameters) - set(own) == {"weight", "lambda"}
        assert list(own) == list(Settings.__annotations__)

    def test_must_be_alike_for_all_tensors(self, tmp_path: Path) -> None:
        base = pico.make_bert(tmp_path / "base")
        models = pico.experts(tmp_path / "experts", base, 2)
        recipe = {
            "merge_method": "awd",
            "base_model": str(base),
            "models": [{"model": str(m)} for m in models],
            "parameters": {"alpha": [0.1, 0.5]},
        }
        with pytest.raises(RecipeError, match="alpha: awd takes one value for the whole model"):
            plait.merge(recipe, tmp_path / "out")


@pytest.mark.parametrize("options", [{}, {"granularity": "block"}, {"optimizer": "adam", "steps": 4}], ids=str)
def test_a_folder_gives_what_memory_gives(options: dict[str, Any], tmp_path: Path) -> None:
    base = pico.make_vit(tmp_path / "base")
    models = pico.experts(tmp_path / "experts", base, 3)
    for threads, order in ((1, models), (3, models[::-1])):
        recipe = {
            "merge_method": "awd",
            "base_model": str(base),
            "models": [{"model": str(m), "name": m.name} for m in order],
            "parameters": {"weight": 0.3, **options},
        }
        made = plait.merge(recipe, tmp_path / f"out{threads}", threads=threads)
        got = load_file(made.path / "model.safetensors")
        want = AWD([pico.read(m) for m in order], pico.read(base), weight=0.3, tasks=[m.name for m in order], **options)
        for name, values in got.items():
            torch.testing.assert_close(values, want[name], rtol=1e-6, atol=1e-7)
    first, second = (tmp_path / f"out{threads}" / "model.safetensors" for threads in (1, 3))
    assert first.read_bytes() == second.read_bytes()
