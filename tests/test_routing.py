"""Routed models: what is stored, mixed, saved and loaded; equivalences that hold whatever the architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import plait
from plait.engine import Engine
from plait.plan import make_plan
from plait.recipe import load_recipe
from plait.routing import mixing
from plait.routing.build import prepare, write_folder
from plait.routing.packing import bits_of, flags_of, pack, unpack
from plait.routing.routers import of_top
from plait.routing.stores import Store
from plait.stages import Silent

FAMILIES: dict[str, Callable[..., Path]] = {
    "llama": pico.make_llama, "bert": pico.make_bert, "vit": pico.make_vit, "clip": pico.make_clip_vision,
    "t5": pico.make_t5,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "twin": {"rank": 3}, "wemoe": {"depth": 2}, "e_wemoe": {}, "smile": {"rank": 4, "directions": 2}, "emr": {},
    "tall_mask": {},
}  # fmt: skip
TOLD = ("emr", "tall_mask")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[Path]]:
    root = tmp_path_factory.mktemp(request.param)
    base = FAMILIES[request.param](root / "base")
    return request.param, base, pico.experts(root / "experts", base, 3)


def recipe(base: Path, experts: list[Path], method: str, **more: Any) -> dict[str, Any]:
    models = [{"model": str(path), "name": path.name} for path in experts]
    return {"merge_method": method, "base_model": str(base), "models": models, **more}


def build(given: dict[str, Any], out: Path) -> Any:
    """The routed model with untrained routers, in a folder and loaded from it."""
    plan = make_plan(load_recipe(given))
    engine = Engine(threads=1, memory=1 << 29, device="cpu", progress=Silent())
    try:
        write_folder(prepare(plan, engine, None), out)
    finally:
        plan.library.close()
    return plait.from_pretrained(out)


def batch(name: str, model: Any, rows: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    if name in ("vit", "clip"):
        size = model.config.image_size
        return {"pixel_values": torch.randn(rows, 3, size, size, generator=generator)}
    ids = torch.randint(5, 90, (rows, 7), generator=generator)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found["attention_mask"][1, 4:] = 0  # one sample is shorter
    return {**found, "decoder_input_ids": ids[:, :3]} if name == "t5" else found


@torch.no_grad()
def out(model: Any, inputs: dict[str, Tensor], **told: Any) -> Tensor:
    found = model(**inputs, **told)
    return found.logits if "logits" in found else found.last_hidden_state


def plain(model: Any) -> Any:
    """The architecture's own class."""
    return type(model).__mro__[2]


def real(name: str, inputs: dict[str, Tensor], row: int) -> slice:
    """Tokens that are not padding; the others' states mean nothing."""
    if "attention_mask" not in inputs or name == "t5":
        return slice(None)
    return slice(int(inputs["attention_mask"][row].sum()))


class TestEveryFamily:
    @pytest.mark.parametrize("method", METHODS)
    def test_a_mixed_batch_is_what_each_sample_gets_alone(
        self, family: tuple[str, Path, list[Path]], method: str, tmp_path: Path
    ) -> None:
        name, base, experts = family
        model = build(recipe(base, experts, method, route=METHODS[method]), tmp_path / "routed")
        inputs = batch(name, model)
        tasks = [experts[k].name for k in (0, 1, 0, 2)]
        told = {"tasks": tasks} if method in TOLD else {}
        together = out(model, inputs, **told)
        for row in range(4):
            alone = {key: value[row : row + 1] for key, value in inputs.items()}
            single = out(model, alone, **({"tasks": tasks[row : row + 1]} if told else {}))[0]
            kept = real(name, inputs, row)
            assert float((single[kept] - together[row][kept]).abs().max()) <= 1e-5

    @pytest.mark.parametrize("method", METHODS)
    def test_saved_again_it_is_the_same(
        self, family: tuple[str, Path, list[Path]], method: str, tmp_path: Path
    ) -> None:
        name, base, experts = family
        model = build(recipe(base, experts, method, route=METHODS[method]), tmp_path / "routed")
        told = {"tasks": [experts[1].name] * 4} if method in TOLD else {}
        model.save_pretrained(tmp_path / "again")
        again = plait.from_pretrained(tmp_path / "again")
        inputs = batch(name, model)
        assert torch.equal(out(model, inputs, **told), out(again, inputs, **told))
        first, second = (load_file(tmp_path / name / "routed.safetensors") for name in ("routed", "again"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)

    def test_full_rank_and_one_hot_is_the_expert(self, family: tuple[str, Path, list[Path]], tmp_path: Path) -> None:
        name, base, experts = family
        model = build(recipe(base, experts, "twin", route={"ratio": 1.0}), tmp_path / "routed")
        inputs = batch(name, model)
        got = out(model, inputs, tasks=[experts[k].name for k in (0, 1, 0, 2)])
        if name == "t5":  # its table of relative positions is not called with samples, so it stays merged
            pytest.skip("relative_attention_bias is merged")
        for row, k in enumerate((0, 1, 0, 2)):
            kept = real(name, inputs, row)
            wanted = out(plain(model).from_pretrained(experts[k]), inputs)[row]
            assert float((got[row] - wanted)[kept].abs().max()) <= 1e-5

    def test_one_expert_under_emr_is_the_expert(self, family: tuple[str, Path, list[Path]], tmp_path: Path) -> None:
        name, base, experts = family
        model = build(recipe(base, experts[:1], "emr"), tmp_path / "routed")
        if name == "t5":
            pytest.skip("relative_attention_bias is merged")
        inputs = batch(name, model)
        wanted = out(plain(model).from_pretrained(experts[0]), inputs)
        assert float((out(model, inputs, tasks=experts[0].name) - wanted).abs().max()) <= 1e-5

    def test_a_constant_router_is_task_arithmetic(self, family: tuple[str, Path, list[Path]], tmp_path: Path) -> None:
        name, base, experts = family
        model = build(recipe(base, experts, "wemoe", route={"depth": 0}), tmp_path / "routed")
        plait.merge(recipe(base, experts, "task_arithmetic", parameters={"weight": 0.3}), tmp_path / "static")
        inputs = batch(name, model)
        wanted = out(plain(model).from_pretrained(tmp_path / "static"), inputs)
        assert float((out(model, inputs) - wanted).abs().max()) <= 1e-5


class TestMixing:
    """The three ways to one result, and low rank, against an explicit loop in float64."""

    @pytest.mark.parametrize("tokens", [1, 3, 50])
    @pytest.mark.parametrize("one_hot", [False, True])
    def test_dense(self, tokens: int, one_hot: bool) -> None:
        g = torch.Generator().manual_seed(0)
        x, base, deltas = (torch.randn(s, generator=g).double() for s in ((6, tokens, 5), (4, 5), (3, 4, 5)))
        weights = torch.rand(6, 3, generator=g).double()
        if one_hot:
            weights = torch.eye(3).double()[[0, 2, 0, 0, 2, 0]]
        wanted = torch.stack([x[b] @ (base + sum(weights[b, k] * deltas[k] for k in range(3))).T for b in range(6)])
        bias = torch.rand(4, generator=g).double()
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                for added in (None, bias, bias.expand(6, 1, 4)):
                    plus = wanted if added is None else wanted + added
                    found = mixing._apart(x, weights, base, deltas, added)
                    assert torch.allclose(found, plus, atol=1e-12)
                    found = mixing._merged(x, weights, base, lambda at, to: deltas[:, at:to], added)
                    assert torch.allclose(found, plus, atol=1e-12)
        assert torch.allclose(mixing.dense(x, weights, base, lambda picked: deltas[picked]), wanted, atol=1e-12)
        assert torch.allclose(mixing.dense(x, weights, base, lambda p: deltas[p], free=False), wanted, atol=1e-12)
        groups = [[0, 2, 3, 5], [1, 4]] if one_hot else [[row] for row in range(6)]
        assert torch.allclose(mixing._grouped(x, weights, groups, base, deltas), wanted, atol=1e-12)

    def test_unused_experts_are_not_read(self) -> None:
        x, base = torch.ones(2, 3, 5), torch.ones(4, 5)
        asked: list[list[int]] = []

        def pick(picked: list[int]) -> Tensor:
            asked.append(picked)
            return torch.ones(len(picked), 4, 5)

        mixing.dense(x, torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.25, 0.0]]), base, pick)
        assert asked == [[1]]
        assert torch.equal(mixing.dense(x, torch.zeros(2, 3), base, pick), x @ base.T)

    def test_low_rank(self) -> None:
        g = torch.Generator().manual_seed(0)
        x, down, up = (torch.randn(s, generator=g) for s in ((4, 6, 5), (7, 5), (7, 3)))
        owner = torch.tensor([0, 0, 1, 1, 1, 2, 2])
        weights = torch.rand(4, 3, generator=g)
        wanted = torch.stack(
            [
                sum(weights[b, owner[r]] * torch.outer(x[b] @ down[r], up[r]) for r in range(7)) + torch.zeros(6, 3)
                for b in range(4)
            ]
        )
        base, bias = torch.randn(3, 5, generator=g), torch.randn(3, generator=g)
        wanted = wanted + x @ base.T + bias
        for grad in (True, False):  # without gradients: in place
            with torch.set_grad_enabled(grad):
                assert torch.allclose(
                    mixing.low_rank(x, weights, base, down, up, owner, bias=bias), wanted, atol=1e-5
                )  # fmt: skip
                per_token = weights.unsqueeze(1).expand(4, 6, 3)
                assert torch.allclose(
                    mixing.low_rank(x, per_token, base, down, up, owner, bias=bias.expand(4, 1, 3)), wanted, atol=1e-5
                )

    @torch.no_grad()
    def test_many_tokens_merge_low_rank_experts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        g = torch.Generator().manual_seed(0)
        x, down, up = (torch.randn(s, generator=g) for s in ((19, 70, 12), (24, 12), (24, 14)))
        base, bias, weights = torch.randn(14, 12, generator=g), torch.randn(14, generator=g), torch.rand(19, 4)
        owner = torch.arange(4).repeat_interleave(6)
        thin = mixing.low_rank(x, weights, base, down, up, owner, bias=bias)
        assert (thin - torch.stack([
            row @ (base + (up.T * share[owner]) @ down).T + bias for row, share in zip(x, weights, strict=True)
        ])).abs().max() <= 1e-4  # fmt: skip
        merged: list[int] = []
        inner = mixing._merged
        monkeypatch.setattr(mixing, "_merged", lambda *given: merged.append(1) or inner(*given))
        for entries in (1 << 20, 40):  # in one block of rows, and in many
            monkeypatch.setattr(mixing, "_blocks", lambda *_, entries=entries: (8, entries))
            found = mixing.low_rank(x, weights, base, down, up, owner, rank=6, bias=bias)
            assert float((found - thin).abs().max()) <= 1e-5 * float(thin.abs().max())
        assert merged == [1, 1]

    @pytest.mark.parametrize("top", [1, 2])
    def test_samples_that_use_few_low_rank_experts_read_theirs_alone(
        self, top: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        g = torch.Generator().manual_seed(top)
        x, down, up = (torch.randn(s, generator=g) for s in ((5, 60, 6), (16, 6), (16, 3)))
        owner = torch.arange(8).repeat_interleave(2)
        weights = of_top(torch.rand(5, 8, generator=g).softmax(-1), top)
        base = torch.randn(3, 6, generator=g)
        all_of_them = mixing.low_rank(x, weights, base, down, up, owner)
        whole = mixing.linear

        def base_alone(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            assert weight is base  # not all experts' directions
            return whole(given, weight, bias)

        monkeypatch.setattr(mixing, "linear", base_alone)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                found = mixing.low_rank(x, weights, base, down, up, owner, rank=2, top=top)
                assert torch.allclose(found, all_of_them, atol=1e-5)


class TestStores:
    @pytest.mark.parametrize("precision", ["int8", "int4"])
    @pytest.mark.parametrize("n", [1, 31, 32, 100])
    def test_packed_integers_are_the_nearest_multiples(self, precision: Any, n: int) -> None:
        values = torch.randn(3, n, generator=torch.Generator().manual_seed(n)) * 0.01
        codes, scales = pack(values, precision)
        back = unpack(codes, scales, n, precision)
        step = scales.float().repeat_interleave(32, 1)[:, :n]
        assert float(((back - values).abs() / step).max()) <= 0.5 + 1e-3
        bits = 8 * (codes.numel() + 2 * scales.numel()) / (3 * -(-n // 32) * 32)
        assert bits == {"int8": 8.5, "int4": 4.5}[precision]

    def test_zeros_and_extremes_stay_finite(self) -> None:
        for values in (torch.zeros(1, 40), torch.full((1, 40), 1e30), torch.full((1, 40), 1e-30)):
            codes, scales = pack(values, "int4")
            assert torch.isfinite(unpack(codes, scales, 40, "int4")).all()

    @pytest.mark.parametrize("n", [1, 7, 8, 9, 100])
    def test_bits(self, n: int) -> None:
        flags = torch.rand(2, n, generator=torch.Generator().manual_seed(n)) < 0.5
        assert torch.equal(flags_of(bits_of(flags), n), flags)
        assert bits_of(flags).shape == (2, -(-n // 8))

    @pytest.mark.parametrize("kind", ["dense", "low_rank", "pruned", "masked"])
    @pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
    def test_what_is_laid_out_is_what_is_written(self, kind: Any, precision: Any) -> None:
        g = torch.Generator().manual_seed(1)
        store = Store(
            kind, (5, 6), 2, precision, ranks=(2, 3) if kind == "low_rank" else (),
            counts=(7, 4) if kind == "pruned" else (),
        )  # fmt: skip
        bits = torch.zeros(2, 30, dtype=torch.bool)
        bits[0, :7], bits[1, 3:7] = True, True
        parts = {name: torch.randn(shape, generator=g) for name, shape in store.floats().items()}
        parts |= {"bits": bits} if kind in ("pruned", "masked") else {}
        stored = store.encode(
            parts if kind in ("pruned", "masked") else {k: v for k, v in parts.items() if k != "bits"}
        )
        assert {s.name: s.shape for s in store.specs("x")} == {f"x.{k}": tuple(v.shape) for k, v in stored.items()}
        again = Store.from_data(json.loads(json.dumps(store.as_data())), 2, "here")
        assert again == store
        deltas = store.deltas(store.decode(stored))
        assert deltas.shape == (2, 5, 6)
        exact = store.deltas(dict(parts))
        tolerance = {"float32": 0, "bfloat16": 0.05, "int8": 0.05, "int4": 0.9}[precision]
        assert float((deltas.float() - exact).abs().max()) <= tolerance
        assert torch.equal(store.deltas(store.decode(stored), [1])[0], deltas[1])


class TestReferences:
    """Against numpy, from the equations."""

    @pytest.fixture
    def llama(self, tmp_path: Path) -> tuple[Path, list[Path], dict[str, Any]]:
        base = pico.make_llama(tmp_path / "base")
        experts = pico.experts(tmp_path / "experts", base, 3)
        files = [load_file(path / "model.safetensors") for path in (base, *experts)]
        return base, experts, {key: np.stack([f[key].double().numpy() for f in files]) for key in files[0]}

    @pytest.mark.parametrize("rescale", ["model", "tensor_mean"])
    def test_emr(self, llama: Any, rescale: str, tmp_path: Path) -> None:
        base, experts, values = llama
        model = build(recipe(base, experts, "emr", route={"rescale": rescale}), tmp_path / "routed")
        above, below, unified, masks = np.zeros(3), np.zeros(3), {}, {}
        for key, stack in values.items():
            tau = stack[1:] - stack[0]
            sign = np.sign(tau.sum(0))
            unified[key] = sign * np.max(np.where(np.sign(tau) == sign, np.abs(tau), 0), axis=0)
            masks[key] = tau * unified[key] > 0
            mean = (lambda v: v.sum(axis=tuple(range(1, v.ndim)))) if rescale == "model" else (
                lambda v: v.mean(axis=tuple(range(1, v.ndim)))
            )  # fmt: skip
            above += mean(np.abs(tau))
            below += mean(np.abs(masks[key] * unified[key]))
        scale = above / below
        for key in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
            layer = model.get_submodule(key.removesuffix(".weight"))
            got = layer.experts["weight"].deltas(torch.zeros(1)).double().numpy()
            wanted = scale.reshape(-1, *[1] * (got.ndim - 1)) * masks[key] * unified[key]
            assert np.abs(got - wanted).max() < 1e-7

    def test_tall_mask(self, llama: Any, tmp_path: Path) -> None:
        base, experts, values = llama
        model = build(recipe(base, experts, "tall_mask", route={"threshold": 0.5}), tmp_path / "routed")
        key = "model.layers.1.self_attn.q_proj"
        tau = values[f"{key}.weight"][1:] - values[f"{key}.weight"][0]
        wanted = (np.abs(tau) >= 0.5 * np.abs(tau.sum(0) - tau)) * tau.sum(0)
        got = model.get_submodule(key).experts["weight"].deltas(torch.zeros(1)).double().numpy()
        assert (np.abs(got - wanted) > 1e-7).mean() < 0.002  # entries at the threshold, in float32

    def test_twin(self, llama: Any, tmp_path: Path) -> None:
        base, experts, values = llama
        model = build(recipe(base, experts, "twin", route={"ratio": 0.25}), tmp_path / "routed")
        key = "model.layers.1.mlp.down_proj"
        stack = values[f"{key}.weight"]
        shared = stack[0] + 0.3 * (stack[1:] - stack[0]).sum(0)
        layer = model.get_submodule(key)
        assert np.abs(layer.base.weight.double().numpy() - shared).max() < 1e-6
        got = layer.experts["weight"].deltas(torch.zeros(1)).double().numpy()
        for k in range(3):
            u, s, vt = np.linalg.svd(stack[1 + k] - shared, full_matrices=False)
            rank = int(0.25 * min(stack[0].shape))
            assert np.abs(got[k] - (u[:, :rank] * s[:rank]) @ vt[:rank]).max() < 1e-6

    def test_smile_gates_by_what_an_expert_reads(self, llama: Any, tmp_path: Path) -> None:
        base, experts, values = llama
        model = build(recipe(base, experts, "smile", route={"rank": 6, "directions": 2, "top": 1}), tmp_path / "routed")
        key = "model.layers.0.mlp.gate_proj"
        stack, layer = values[f"{key}.weight"], model.get_submodule(key)
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            got = layer(x).double().numpy()
        parts = [np.linalg.svd(stack[1 + k] - stack[0], full_matrices=False) for k in range(3)]
        for b in range(2):
            for t in range(5):
                token = x[b, t].double().numpy()
                best = int(np.argmax([np.linalg.norm(vt[:2] @ token) for _, _, vt in parts]))
                u, s, vt = parts[best]
                wanted = stack[0] @ token + (u[:, :6] * s[:6]) @ (vt[:6] @ token)
                assert np.abs(got[b, t] - wanted).max() < 1e-5

    def test_wemoe_router(self, llama: Any, tmp_path: Path) -> None:
        base, experts, _ = llama
        model = build(recipe(base, experts, "wemoe"), tmp_path / "routed")
        router = model.get_submodule("routers.1")
        assert [tuple(layer.weight.shape) for layer in router.layers] == [(32, 32), (3, 32)]
        assert router.layers[1].bias.tolist() == pytest.approx([0.3] * 3)
        assert float(router.layers[0].bias.abs().max()) == 0
        assert float(router.layers[0].weight.std()) == pytest.approx(0.01, rel=0.1)
        h = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
        w0, w1 = (layer.weight.double().numpy() for layer in router.layers)
        hidden = np.maximum(h.double().numpy() @ w0.T, 0)
        wanted = (hidden @ w1.T + 0.3).mean(1)
        assert np.abs(router(h).double().numpy() - wanted).max() < 1e-6
