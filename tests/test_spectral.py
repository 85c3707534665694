"""Spectral methods: against float64 references, in the cases that have no full rank, and as stages of recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_spectral as ref
import torch
from safetensors.torch import load_file

import plait
from plait.errors import RecipeError
from plait.methods import Block, get_method
from plait.methods.compose import method_of
from plait.methods.finishes import svc
from plait.methods.matrices import is_matrix, largest, polar, svd
from plait.methods.spectral import singular_parts, singular_vectors
from plait.methods.wudi import is_linear
from plait.recipe import load_recipe

Tensors = list[torch.Tensor]
NAMES = ["tsv_m", "iso_c", "iso_cts", "wudi", "knots"]

CASES: list[tuple[str, dict[str, Any], Callable[..., np.ndarray], dict[str, Any]]] = [
    ("tsv_m", {}, ref.tsv_m, {}),
    ("tsv_m", {"weight": [0.5, 1, -0.3], "lambda": 0.7}, ref.tsv_m, {"weight": [0.5, 1, -0.3], "lambda_": 0.7}),
    ("iso_c", {"lambda": 1.5}, ref.iso_c, {"lambda_": 1.5}),
    ("iso_c", {"weight": [2, 1, 0.1]}, ref.iso_c, {"weight": [2, 1, 0.1]}),
    ("iso_cts", {}, ref.iso_cts, {}),
    ("iso_cts", {"common": 0.35, "weight": [1, 0.5, 2]}, ref.iso_cts, {"common": 0.35, "weight": [1, 0.5, 2]}),
    ("iso_cts", {"common": 0}, ref.iso_cts, {"common": 0.0}),
    ("wudi", {}, ref.wudi, {}),
    ("wudi", {"steps": 40, "lr_absolute": 1e-3}, ref.wudi, {"steps": 40, "lr_absolute": 1e-3}),
    ("knots", {"density": 0.3}, ref.knots, {"density": 0.3}),
    (
        "knots",
        {"weight": [1, 2, 0.5], "normalize": False, "lambda": 0.3},
        ref.knots,
        {"weight": [1, 2, 0.5], "normalize": False, "lambda_": 0.3},
    ),
    ("knots", {"by": "linear"}, ref.knots, {"by": "linear"}),
]


def make(shape: tuple[int, ...], count: int = 3, seed: int = 0) -> tuple[torch.Tensor, Tensors]:
    """Task vectors of decaying spectrum and different size, in float64, near the grid of float32."""
    random = np.random.default_rng(seed)
    base = random.normal(size=shape)
    models = []
    for k in range(count):
        tau = random.normal(size=shape)
        if len(shape) > 1:
            u, s, vt = np.linalg.svd(tau.reshape(shape[0], -1), full_matrices=False)
            tau = (u * s / (1 + np.arange(len(s))) @ vt).reshape(shape)
        models.append(torch.tensor(base + 0.05 * (k + 1) * tau))
    return torch.tensor(base), models


def apart(got: torch.Tensor, want: np.ndarray, base: torch.Tensor) -> float:
    """Norm of the difference, by the norm of what was added to the base."""
    added = np.linalg.norm(want - base.double().numpy())
    return float(np.linalg.norm(got.double().numpy() - want) / max(added, 1e-12))


@pytest.mark.parametrize("shape", [(33, 65), (40, 21), (24, 24), (2, 9), (6, 4, 3, 3), (17,)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{'-'.join(case[1]) or 'defaults'}")
def test_agrees_with_the_reference(case: Any, shape: tuple[int, ...]) -> None:
    name, params, reference, arguments = case
    base, models = make(shape)
    want = reference(base.numpy(), [m.numpy() for m in models], **arguments)
    assert apart(get_method(name)(models, base, **params), want, base) < 1e-9
    base, models = base.float(), [m.float() for m in models]
    deltas = [(m - base).double().numpy() for m in models]  # what float32 makes of them is where the method starts
    want = reference(np.zeros(shape), deltas, **arguments)
    got = get_method(name)([m - base for m in models], torch.zeros(shape), **params)
    assert apart(got, want, torch.zeros(shape)) < 1e-5


@pytest.mark.parametrize("alpha", [None, 1.0, 0.05])
@pytest.mark.parametrize("shape", [(33, 65), (40, 21), (6, 4, 3, 3), (17,)], ids=str)
def test_calibration_agrees_with_the_reference(shape: tuple[int, ...], alpha: float | None) -> None:
    base, models = make(shape)
    taus = [(m - base).numpy() for m in models]
    block = Block.of(models, base, scope="tensor")
    merged = sum(models[1:], models[0]) - 3 * base
    got = svc(block, Block.of([merged], scope="tensor").models.map(lambda values: values[0]), alpha=alpha).gather()
    want = ref.svc(merged.numpy(), taus, alpha)
    assert np.linalg.norm(got.numpy().reshape(shape) - want) <= 1e-9 * np.linalg.norm(want)


def awkward() -> dict[str, Tensors]:
    """Task vectors without full rank, by what is odd about them."""
    torch.manual_seed(5)
    a, b, c = (0.1 * torch.randn(20, 30) for _ in range(3))
    thin = [torch.randn(20, 2) @ torch.randn(2, 30) for _ in range(3)]
    return {
        "the same twice": [a, b, a.clone()],
        "opposite": [a, -a, b],
        "one untrained": [a, torch.zeros(20, 30), c],
        "LoRA": thin,
        "LoRA of one subspace": [thin[0], 2 * thin[0], thin[1]],
        "rows that nobody trained": [torch.cat([t[:5], torch.zeros(15, 30)]) for t in (a, b, c)],
        "one trained": [torch.zeros(20, 30), b, torch.zeros(20, 30)],
    }


REFERENCES = {"tsv_m": ref.tsv_m, "iso_c": ref.iso_c, "iso_cts": ref.iso_cts, "wudi": ref.wudi, "knots": ref.knots}


@pytest.mark.parametrize("kind", awkward())
@pytest.mark.parametrize("name", NAMES)
def test_missing_rank_is_left_out(name: str, kind: str) -> None:
    taus, nothing = awkward()[kind], torch.zeros(20, 30)
    got = get_method(name)(taus, nothing)
    assert torch.isfinite(got).all()
    want = REFERENCES[name](nothing.numpy(), [t.double().numpy() for t in taus])
    # Adam turns what is left of a gradient that vanishes into whole steps: 300 of them end a little apart.
    assert apart(got, want, nothing) < (1e-4 if name == "wudi" else 1e-5)


@pytest.mark.parametrize("kind", awkward())
def test_calibration_of_missing_rank(kind: str) -> None:
    taus = awkward()[kind]
    merged = torch.stack(taus).sum(0)
    block = Block.of(taus, torch.zeros(20, 30), scope="tensor")
    got = svc(block, block.deltas.map(lambda values: values.sum(0))).gather().reshape(20, 30)
    want = ref.svc(merged.double().numpy(), [t.double().numpy() for t in taus])
    assert apart(got, want, torch.zeros(20, 30)) < 1e-5


class TestEquivalences:
    def test_singular_values_of_iso_c_are_equal(self) -> None:
        base, models = make((30, 50))
        _, s, _ = torch.linalg.svd(get_method("iso_c")(models, base) - base)
        _, before, _ = torch.linalg.svd(sum(models[1:], models[0]) - 3 * base)
        torch.testing.assert_close(s, torch.full_like(s, 1.3 * float(before.mean())))

    def test_iso_cts_with_common_directions_alone_is_iso_c(self) -> None:
        base, models = make((30, 50))
        torch.testing.assert_close(
            get_method("iso_cts")(models, base, common=1), get_method("iso_c")(models, base), rtol=1e-10, atol=1e-10
        )

    @pytest.mark.parametrize("name", ["tsv_m", "knots", "wudi"])
    def test_one_expert_is_the_expert(self, name: str) -> None:
        base, models = make((30, 50), 1)
        torch.testing.assert_close(get_method(name)(models, base), models[0], rtol=1e-9, atol=1e-9)

    def test_knots_by_a_sum_is_task_arithmetic(self) -> None:
        base, models = make((30, 50))
        for normalize in (True, False):
            torch.testing.assert_close(
                get_method("knots")(models, base, by="linear", weight=[1, 2, 0.5], normalize=normalize),
                get_method("task_arithmetic")(models, base, weight=[1, 2, 0.5], normalize=normalize),
            )

    @pytest.mark.parametrize("by", ["ties", "dare_ties"])
    def test_knots_of_what_is_no_matrix_is_the_plain_merge(self, by: str) -> None:
        base, models = make((40,))
        want = get_method(by)(models, base, density=0.4, normalize=True)
        assert torch.equal(get_method("knots")(models, base, by=by, density=0.4), want)

    def test_knots_by_dare_drops_and_keeps_its_expectation(self) -> None:
        base, models = make((60, 80), 2)
        knots = get_method("knots")
        runs = [knots(models, base, by="dare_ties", density=0.5, normalize=False, seed=s) - base for s in range(2)]
        assert not torch.allclose(*runs)
        assert torch.equal(runs[0], knots(models, base, by="dare_ties", density=0.5, normalize=False) - base)

    def test_no_steps_of_wudi_is_the_sum(self) -> None:
        base, models = make((30, 50))
        torch.testing.assert_close(
            get_method("wudi")(models, base, steps=0), get_method("task_arithmetic")(models, base)
        )

    @pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_ridge_of_wudi_is_its_least_squares(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        base, models = make(shape)
        models.append(base.clone())  # an expert without a say
        want = ref.wudi_ridge(base.numpy(), [m.numpy() for m in models], 0.1)
        got = get_method("wudi")([m.to(dtype) for m in models], base.to(dtype), ridge=0.1)
        assert apart(got, want, base) < (1e-10 if dtype == torch.float64 else 1e-5)

    def test_ridge_of_wudi_lies_between_the_sum_and_the_minimum(self) -> None:
        base, models = make((30, 50))
        total = get_method("task_arithmetic")(models, base)
        torch.testing.assert_close(get_method("wudi")(models, base, ridge=1e9), total, rtol=1e-6, atol=1e-6)
        assert torch.equal(get_method("wudi")([base, base], base, ridge=0.1), base)

    def test_steps_of_wudi_lower_its_loss(self) -> None:
        base, models = make((30, 50))
        taus = [m - base for m in models]

        def loss(x: torch.Tensor) -> float:
            return sum(float(((x - tau) @ tau.T).square().sum() / tau.square().sum()) for tau in taus)

        losses = [loss(get_method("wudi")(models, base, steps=n) - base) for n in (0, 30, 300)]
        assert losses[0] > 2 * losses[1] > 2 * losses[2]

    def test_scale_of_the_weights_does_not_matter_to_wudi(self) -> None:
        base, models = make((30, 50))
        nothing = torch.zeros_like(base)
        small = get_method("wudi")([1e-6 * (m - base) for m in models], nothing)
        large = get_method("wudi")([m - base for m in models], nothing)
        torch.testing.assert_close(small * 1e6, large, rtol=1e-6, atol=1e-9)

    def test_calibration_shrinks_what_two_experts_share(self) -> None:
        tau = torch.randn(10, 12, generator=torch.Generator().manual_seed(1))
        block = Block.of([tau, tau.clone()], torch.zeros(10, 12), scope="tensor")
        calibrated = svc(block, block.deltas.map(lambda values: values.sum(0)), alpha=1).gather()
        torch.testing.assert_close(calibrated.reshape(10, 12), tau)

    def test_calibration_leaves_experts_apart_alone(self) -> None:
        a, b = torch.zeros(10, 12), torch.zeros(10, 12)
        a[:5, :6], b[5:, 6:] = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
        block = Block.of([a, b], torch.zeros(10, 12), scope="tensor")
        calibrated = svc(block, block.deltas.map(lambda values: values.sum(0))).gather()
        torch.testing.assert_close(calibrated.reshape(10, 12), a + b)


@pytest.mark.parametrize("name", NAMES)
def test_untrained_tensors_are_the_base_bit_by_bit(name: str) -> None:
    base, _ = make((30, 50))
    base = base.float()
    assert torch.equal(get_method(name)([base.clone(), base.clone()], base), base)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (0, 4), (4, 0), (2, 2), (2, 3, 0, 1), (1, 1, 5, 5)], ids=str)
def test_small_shapes(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    base = torch.randn(shape)
    result = get_method(name)([base + torch.randn(shape) for _ in range(5)], base)
    assert result.shape == shape
    assert torch.isfinite(result).all()


MATRICES = [
    ("model.layers.0.mlp.up_proj.weight", (8, 4), True, True),
    ("encoder.block.3.layer.0.SelfAttention.q.weight", (4, 4), True, True),
    ("features.0.0.weight", (8, 3, 3, 3), True, False),
    ("visual_projection.weight", (8, 4), True, False),
    ("tensor", (8, 4), True, True),
    ("model.embed_tokens.weight", (96, 4), False, False),
    ("vit.embeddings.patch_embeddings.projection.weight", (8, 3, 4, 4), False, False),
    ("shared.weight", (96, 4), False, False),
    ("lm_head.weight", (96, 4), False, False),
    ("h.0.wpe.weight", (96, 4), False, False),
    ("model.shared_expert.0.weight", (8, 4), True, True),
    ("layers.0.bias", (8,), False, False),
    ("layers.0.norm.weight", (1, 8), False, False),
    ("layers.0.experts", (4, 8, 8), False, False),
    ("layers.0.conv.weight", (8, 1, 1, 1), False, False),
]


@pytest.mark.parametrize(("name", "shape", "matrix", "linear"), MATRICES)
def test_what_counts_as_a_matrix(name: str, shape: tuple[int, ...], matrix: bool, linear: bool) -> None:
    assert is_matrix(name, shape) is matrix
    assert is_linear(name, shape) is linear
    for method, whole in (("tsv_m", matrix), ("wudi", linear)):
        assert get_method(method).scope_for({}, name, shape) == ("tensor" if whole else "element")


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decomposition_is_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    u, s, v = svd(matrix)
    torch.testing.assert_close((u * s) @ v.T, matrix.double(), rtol=0, atol=1e-12)
    for side in (u, v):
        torch.testing.assert_close(side.T @ side, torch.eye(30, dtype=torch.float64), rtol=0, atol=1e-12)
    factor, sizes = polar(matrix)
    torch.testing.assert_close(factor, u @ v.T, rtol=0, atol=1e-10)
    torch.testing.assert_close(sizes.sort(descending=True).values, s, rtol=1e-10, atol=0)


def spectra(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Matrices of which few singular vectors are wanted, by how their singular values fall."""
    noise = torch.Generator().manual_seed(0)
    normal = torch.randn(shape, generator=noise, dtype=torch.float64)
    low = torch.randn(shape[0], 16, generator=noise) @ torch.randn(16, shape[1], generator=noise)
    u, _, vh = torch.linalg.svd(normal, full_matrices=False)
    place = 1.0 + torch.arange(len(vh))
    falling = {f"1/i^{power}": (u * place**-power) @ vh for power in (1, 2, 4)}
    return {"random": normal, "LoRA": low, "LoRA and noise": low + normal, "one": normal[:, :1] * vh[:1],
            "nothing": 0 * normal, **falling}  # fmt: skip


@pytest.mark.parametrize("shape", [(300, 200), (200, 200), (200, 500)], ids=str)
@pytest.mark.parametrize("kind", spectra((4, 4)))
def test_few_of_many_triplets_are_those_of_float64(kind: str, shape: tuple[int, int]) -> None:
    matrix = spectra(shape)[kind].float()
    u, s, v = largest(matrix, 25)
    want_u, want_s, want_v = svd(matrix.double())
    count = min(25, int(torch.count_nonzero(want_s > 1e-5 * want_s[:1].sum())))
    assert len(s) == count
    torch.testing.assert_close(s, want_s[:count], rtol=1e-5, atol=1e-9)
    # Single vectors may turn among equals; what they span together, weighed by the singular values, may not.
    want = (want_u[:, :count] * want_s[:count]) @ want_v[:, :count].T
    assert float(torch.linalg.norm((u * s) @ v.T - want)) <= 1e-4 * float(torch.linalg.norm(want))
    torch.testing.assert_close(u.T @ u, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-5)


def spelt(llama: dict[str, Path], **more: Any) -> dict[str, Any]:
    models = [{"model": str(llama[name])} for name in ("one", "two", "three")]
    return {"base_model": str(llama["base"]), "models": models, **more}


@pytest.mark.parametrize("name", NAMES)
def test_threads_and_order_change_nothing(name: str, llama: dict[str, Path], tmp_path: Path) -> None:
    recipe = spelt(llama, merge_method=name, parameters={"steps": 5} if name == "wudi" else {})
    first = plait.merge(recipe, tmp_path / "first", threads=1)
    recipe["models"].reverse()
    second = plait.merge(recipe, tmp_path / "second", threads=3)
    assert first.hashes == second.hashes
    scopes = {tensor.name: tensor.scope for tensor in first.plan.merged}
    assert scopes["model.layers.0.mlp.up_proj.weight"] == "tensor"
    assert scopes["model.embed_tokens.weight"] == scopes["model.norm.weight"] == "element"


STAGES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"combine": "tsv_m"}, "tsv_m", {}),
    ({"combine": "iso_c", "finish": [{"scale": {"lambda": 1.3}}]}, "iso_c", {}),
    ({"combine": {"iso_cts": {"common": 0.5}}, "finish": [{"scale": {"lambda": 1.3}}]}, "iso_cts", {"common": 0.5}),
    ({"combine": {"wudi": {"steps": 5}}}, "wudi", {"steps": 5}),
    ({"combine": {"knots": {"density": 0.3}}}, "knots", {"density": 0.3}),
]


@pytest.mark.parametrize(("stages", "name", "parameters"), STAGES, ids=[c[1] for c in STAGES])
def test_spelt_out_methods_are_the_named_ones(
    stages: dict[str, Any], name: str, parameters: dict[str, Any], llama: dict[str, Path], tmp_path: Path
) -> None:
    composed = plait.merge(spelt(llama, **stages), tmp_path / "spelt")
    named = plait.merge(spelt(llama, merge_method=name, parameters=parameters), tmp_path / "named")
    assert composed.hashes == named.hashes


FINISHED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"combine": "sum", "finish": [{"svc": {"alpha": 0.5}}]}, {"alpha": 0.5}),
    ({"merge_method": "task_arithmetic", "finish": ["svc"], "parameters": {"alpha": 0.5}}, {"alpha": 0.5}),
    ({"merge_method": "task_arithmetic", "finish": ["svc"]}, {}),
]


@pytest.mark.parametrize(("recipe", "arguments"), FINISHED)
def test_calibration_finishes_any_merge(
    recipe: dict[str, Any], arguments: dict[str, Any], llama: dict[str, Path], tmp_path: Path
) -> None:
    made = plait.merge(spelt(llama, **recipe), tmp_path / "out")
    got = load_file(made.path / "model.safetensors")
    base, *experts = (load_file(llama[name] / "model.safetensors") for name in ("base", "one", "two", "three"))
    for name, values in got.items():
        taus = [(expert[name].double() - base[name].double()).numpy() for expert in experts]
        delta = np.sum(taus, axis=0)
        want = ref.svc(delta, taus, **arguments) if is_matrix(name, tuple(values.shape)) else delta
        np.testing.assert_allclose(values.double().numpy(), base[name].double().numpy() + want, rtol=0, atol=1e-5)


def test_a_finish_beside_a_named_method_is_its_own_stage(llama: dict[str, Path], tmp_path: Path) -> None:
    """Shared names go by stage; scope, survey and number of experts are the named method's."""
    data = spelt(
        llama,
        merge_method="ties",
        finish=[{"scale": {"lambda": 0.5}}],
        parameters={"ties.lambda": 0.8, "density": 0.3, "trim": "model"},
    )
    composed = load_file(plait.merge(data, tmp_path / "spelt").path / "model.safetensors")
    whole = spelt(llama, merge_method="ties", parameters={"lambda": 0.4, "density": 0.3, "trim": "model"})
    named = load_file(plait.merge(whole, tmp_path / "named").path / "model.safetensors")
    for name, values in named.items():
        torch.testing.assert_close(composed[name], values, rtol=0, atol=1e-6)
    method, _ = method_of(load_recipe(spelt(llama, merge_method="della", finish=["svc"])))
    assert method.name == "della → svc"
    assert method.scope_for({}, "model.norm.weight", (32,)) == "row"
    assert method.scope_for({}, "layers.0.weight", (32, 32)) == "tensor"
    method, _ = method_of(load_recipe(spelt(llama, merge_method="model_stock", finish=["svc"])))
    assert method.experts == (2, None)
    assert method.scope_for({"model_stock__filter_wise": True}, "model.norm.weight", (32,)) == "row"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"merge_method": "ties", "finish": ["svc"], "base_model": None},
            r"merge_method: ties works on task .*add base_model",
        ),
        (
            {"combine": "sum", "finish": ["svc"], "base_model": None},
            r"finish: svc works on task vectors; add base_model",
        ),
        ({"combine": "tsv_m", "base_model": None}, r"combine: tsv_m works on task vectors; add base_model"),
        ({"merge_method": "linear", "finish": ["svc"]}, r"finish: linear merges weights.*give combine instead"),
        ({"merge_method": "ties", "transforms": ["trim"]}, r"transforms: transforms go with combine"),
        ({"merge_method": "tsv_m", "finish": ["svd"]}, r"there is no stage 'svd'; did you mean 'svc'"),
        ({"merge_method": "tsv_m", "finish": [{"svc": {"alpha": 0}}]}, r"alpha: must be a number > 0, got 0"),
        ({"merge_method": "tsv_m", "finish": ["svc"], "parameters": {"alpa": 1}}, r"did you mean 'alpha'"),
        (
            {"merge_method": "tsv_m", "finish": ["scale"], "parameters": {"lambda": 1}},
            r"has no parameter 'lambda'; did you mean '(tsv_m|scale)\.lambda'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str, llama: dict[str, Path]) -> None:
    data = {key: value for key, value in spelt(llama, **change).items() if value is not None}
    with pytest.raises(RecipeError, match=message):
        plait.make_plan(load_recipe(data))


def test_memory_of_a_matrix_is_asked_for_whole(llama: dict[str, Path]) -> None:
    plan = plait.make_plan(load_recipe(spelt(llama, merge_method="tsv_m")))
    by_name = {tensor.name: tensor for tensor in plan.merged}
    matrix, table = by_name["model.layers.0.mlp.up_proj.weight"], by_name["model.embed_tokens.weight"]
    assert len(matrix.grid) == 1
    assert matrix.working_bytes() / matrix.grid.numel > table.working_bytes() / table.grid.numel


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9,), (6, 3, 2, 2)])
def test_the_parts_of_tsv_m_add_up_to_it_and_do_not_meet(shape: tuple[int, ...]) -> None:
    base, models = make(shape)
    block = Block.of(models, base, name="layer.0.weight", scope="tensor")
    parts = singular_parts(block, block.deltas).gather()
    whole = singular_vectors(block, block.deltas).gather()
    assert torch.allclose(parts.sum(0), whole, atol=1e-12)
    if len(shape) > 1:
        left, right = (part.reshape(shape[0], -1) for part in parts[:2])
        assert float((left.T @ right).abs().max()) < 1e-12
        assert float((left @ right.T).abs().max()) < 1e-12


def test_parts_of_frozen_tensors_and_still_experts() -> None:
    base, models = make((8, 8))
    block = Block.of([base, base, base], base, name="layer.0.weight", scope="tensor")
    assert not singular_parts(block, block.deltas).gather().any()
    block = Block.of([base, models[0], models[1]], base, name="layer.0.weight", scope="tensor")
    parts = singular_parts(block, block.deltas).gather()
    assert not parts[0].any()
    assert torch.isfinite(parts).all()
