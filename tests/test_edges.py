"""Inputs at the edge, given to every method: one expert, many, equal ones, constants, task vectors of nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from mini_suite import MiniSuite
from safetensors.torch import load_file, save_file
from test_methods import EXTRA, STATIC, make
from test_routing import build, recipe

import plait
from plait.methods import Block, all_methods, get_method
from plait.methods.memory import InMemory
from plait.methods.stream import Stream

MEAN = ["anchor_schedule", "average", "della", "karcher", "knots", "linear", "model_stock", "multislerp", "nuslerp",
        "passthrough", "sce", "ties"]  # fmt: skip
"""At their defaults K times the same expert is that expert."""
SUM = ["awd", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della_linear", "task_arithmetic"]
"""At their defaults K times the same expert is the base and K times its task vector."""
MATRIX = ["iso_c", "iso_cts", "tsv_m", "wudi"]
"""Equal experts are no special case of theirs on a matrix; on a vector they are means (wudi sums)."""
OTHER = ["consensus", "nearswap", "slerp"]
LEARNED = [
    name for name, method in all_methods().items()
    if method.learned is not None and method.dynamic is None
]  # fmt: skip
SHAPES = [(), (1,), (0,), (5, 0), (33,), (17, 23)]


class Given:
    """What a fit could have learned: a weight for every expert, no mask, and no task vector of its own."""

    facts: dict[str, Any] = {"fit": {"init": 0.25, "concrete": 0.5}}  # noqa: RUF012

    def coefficients(self, name: str) -> list[float]:
        return [0.25] * self.count

    def __init__(self, count: int) -> None:
        self.count = count

    def option(self, key: str) -> Any:
        return self.facts["fit"][key]

    def mask(self, block: Block) -> Stream | None:
        return None

    def delta(self, block: Block) -> Stream | None:
        return None


def merged(name: str, base: torch.Tensor, models: list[torch.Tensor]) -> torch.Tensor:
    """By a method at its defaults; what it needs to have learned is given."""
    method = get_method(name)
    tasks = [f"t{place:02}" for place in range(len(models))]
    extra: dict[str, Any] = {"anchor": tasks[0]} if name == "anchor_schedule" else EXTRA.get(name, {})
    if method.learned is None:
        return method(models, None if method.base == "unused" else base, tasks=tasks, **extra)
    keywords = method.keywords({})
    scope = method.scope_for(keywords, "tensor", tuple(base.shape))
    block = Block.of(models, base, tasks=tasks, scope=scope)
    block.learned = Given(len(models))
    if method.survey is not None:
        block.state = method.survey(InMemory({"tensor": block}, keywords))
    return method.fn(block, **keywords).gather().reshape(base.shape)


def counts(name: str) -> list[int]:
    least, most = get_method(name).experts
    return sorted({least, min(3, most or 3), min(32, most or 32)})


def test_every_method_has_a_place() -> None:
    assert sorted([*MEAN, *SUM, *MATRIX, *OTHER]) == sorted(STATIC)


@pytest.mark.parametrize("name", [*STATIC, *LEARNED])
class TestEveryMethod:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_any_number_of_experts_gives_numbers(self, name: str, shape: tuple[int, ...]) -> None:
        for count in counts(name):
            base, models = make(shape, count, seed=count)
            result = merged(name, base, models)
            assert result.shape == base.shape
            assert torch.isfinite(result).all(), count

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_constants_give_numbers(self, name: str, shape: tuple[int, ...]) -> None:
        for count in counts(name):
            for base_value, value in ((0.0, 0.0), (1.0, 1.0), (0.0, 0.5), (1.0, 0.0)):
                base, models = torch.full(shape, base_value), [torch.full(shape, value) for _ in range(count)]
                assert torch.isfinite(merged(name, base, models)).all(), (count, base_value, value)

    def test_no_task_vector_gives_the_base(self, name: str) -> None:
        for count in counts(name):
            base, _ = make((17, 23), 1)
            torch.testing.assert_close(merged(name, base, [base.clone()] * count), base, rtol=2e-7, atol=1e-7)

    def test_one_of_many_that_did_not_change_does_no_harm(self, name: str) -> None:
        count = counts(name)[-1]
        base, models = make((17, 23), count, seed=5)
        models[0] = base.clone()
        assert torch.isfinite(merged(name, base, models)).all()


@pytest.mark.parametrize("shape", [(), (33,), (17, 23)], ids=str)
@pytest.mark.parametrize("name", [*MEAN, *SUM])
def test_equal_experts(name: str, shape: tuple[int, ...]) -> None:
    base, (expert,) = make(shape, 1, seed=7)
    for count in counts(name):
        want = expert if name in MEAN else base + count * (expert - base)
        torch.testing.assert_close(merged(name, base, [expert.clone()] * count), want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", MATRIX)
def test_equal_experts_of_a_vector(name: str) -> None:
    """What has no singular values is averaged (iso: times λ, 1.3 at its default), or summed."""
    base, (expert,) = make((33,), 1, seed=7)
    for count in counts(name):
        scale = float(((merged(name, base, [expert] * count) - base) / (expert - base)).nanmedian())
        assert round(scale, 4) in (1.0, 1.3, float(count))


@pytest.mark.parametrize("name", ["emr", "tall_mask", "smile"])
@pytest.mark.parametrize("kind", ["equal", "unchanged"])
def test_routed_methods_that_learn_nothing(name: str, kind: str, mini: MiniSuite, tmp_path: Path) -> None:
    weights = load_file(mini.base / "model.safetensors")
    for expert in ("a", "b"):
        (tmp_path / expert).mkdir()
        changed = {k: v + 0.25 if kind == "equal" and v.is_floating_point() else v for k, v in weights.items()}
        save_file(changed, tmp_path / expert / "model.safetensors")
    data = {"merge_method": name, "base_model": str(mini.base), "models": [{"model": str(tmp_path / k)} for k in "ab"]}
    if kind == "unchanged":
        with pytest.raises(plait.PlaitError, match=r".+"):
            plait.merge(data, tmp_path / "out")
        return
    stored = load_file(plait.merge(data, tmp_path / "out").path / "routed.safetensors")
    assert all(torch.isfinite(value.float()).all() for value in stored.values())


@pytest.mark.parametrize("name", ["twin", "wemoe", "e_wemoe", "emr", "tall_mask", "smile"])
@pytest.mark.parametrize("kind", ["one", "equal", "many"])
def test_routed_methods_with_any_number_of_experts(name: str, kind: str, tmp_path: Path) -> None:
    """Routers as they are before they learn."""
    base = pico.make_llama(tmp_path / "base", layers=1)
    experts = pico.experts(tmp_path / "experts", base, {"one": 1, "equal": 1, "many": 32}[kind])
    if kind == "equal":
        experts += [Path(shutil.copytree(experts[0], tmp_path / "experts" / f"copy{i}")) for i in range(2)]
    model = build(recipe(base, experts, name), tmp_path / "out")
    told = {"tasks": [experts[0].name]} if name in ("emr", "tall_mask") else {}
    assert torch.isfinite(model(input_ids=torch.tensor([[5, 6, 7]]), **told).logits).all()
