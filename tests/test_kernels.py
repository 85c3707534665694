"""The compiled loops: the same bytes as torch, for every chain of stages that they know."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import compiled
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import plait
from plait.errors import CheckpointError, MachineError
from plait.kernels import native, selection
from plait.kernels.worker import Worker
from plait.methods import draws
from plait.methods.contract import all_methods, get_method
from plait.methods.select import Cut, Histograms, trivial

loops = compiled.loops
CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("linear", {"normalize": False, "weight": 0.4}),
    ("average", {}),
    ("task_arithmetic", {"weight": [0.37, 1, -0.2]}),
    ("task_arithmetic", {"normalize": True, "lambda": 0.3}),
    ("ties", {}),
    ("ties", {"density": 0.0}),
    ("ties", {"density": 0.2, "normalize": False, "lambda": 0.3}),
    ("ties", {"density": 0.73, "weight": [0.5, 0.1, 2]}),
    ("ties", {"density": [0.2, 1.0, 0.5], "rescale": True}),
    ("ties", {"density": 0.2, "trim": "model"}),
    ("dare_linear", {"density": 0.5, "rescale": False}),
    ("dare_ties", {"density": [0.3, 1.0, 0.9]}),
    ("dare_ties", {"density": 0.3, "rescale_by": "l1"}),
    ("breadcrumbs", {"density": 0.9, "gamma": 0.01}),
    ("breadcrumbs_ties", {"density": 0.4, "gamma": 0.1, "rescale": True}),
    ("della", {"density": 0.5, "epsilon": 0.15}),
    ("della", {"density": [0.5, 1.0, 0.3], "epsilon": 0.1, "rescale": False}),
    ("della_linear", {"density": 0.5, "epsilon": 0.15}),
    ("sce", {}),
    ("sce", {"select_topk": 0.1}),
    ("consensus", {"votes": 1, "mu": 0.4}),
]
SHAPES = {
    "a.weight": (300, 1031), "b.weight": (64, 64), "norm.weight": (77,), "same.weight": (3, 5, 7), "empty": (0, 4),
    "one": (1,), "long": (300_001,), "steps": (700, 101), "wide.steps": (9, 5003),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three experts in three types: zeros, equal magnitudes, −0, a tensor that did not change."""
    root, noise = tmp_path_factory.mktemp("models"), torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=noise) * 0.02 for name, shape in SHAPES.items()}
    for name in ("base", "a", "b", "c"):
        tensors = {}
        for key, value in base.items():
            moved = torch.randn(value.shape, generator=noise) * 0.002
            moved *= torch.rand(value.shape, generator=noise) < 0.7
            if key.endswith("steps"):  # a few magnitudes that many share; wide rows of them are sorted
                moved = torch.randint(-3, 4, value.shape, generator=noise) * 2.0**-9
            tensors[key] = value + moved if name != "base" and key != "same.weight" else value.clone()
        tensors["norm.weight"][:10] = 0.0
        tensors["norm.weight"][5:8] = -0.0
        for kind in (torch.bfloat16, torch.float16, torch.float32):
            folder = root / str(kind).removeprefix("torch.") / name
            folder.mkdir(parents=True)
            save_file({key: value.to(kind) for key, value in tensors.items()}, folder / "model.safetensors")
            (folder / "config.json").write_text('{"model_type": "x"}')
    return root


def recipe(folder: Path, method: str, parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A recipe over a, b, c; lists are values per model."""
    each = {key: value for key, value in parameters.items() if isinstance(value, list)}
    listed = [
        {"model": str(folder / name), "parameters": {key: value[k] for key, value in each.items()}}
        for k, name in enumerate("abc")
    ]
    base = {} if get_method(method).base == "unused" else {"base_model": str(folder / "base")}
    rest = {key: value for key, value in parameters.items() if key not in each}
    return {"merge_method": method, "models": listed, "parameters": rest, **base, **more}


def digest(out: Path) -> str:
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("kind", "out_dtype"), [("bfloat16", None), ("bfloat16", "float32"), ("float32", None), ("float16", None)]
)
@pytest.mark.parametrize(("method", "parameters"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_the_same_bytes_with_and_without(
    method: str, parameters: dict[str, Any], kind: str, out_dtype: str | None, models: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    used: Counter[str] = Counter()
    merge = Worker.merge

    def counted(self: Worker, *arguments: Any) -> memoryview:
        used["pieces"] += 1
        return merge(self, *arguments)

    monkeypatch.setattr(Worker, "merge", counted)
    asked = recipe(models / kind, method, parameters, **({"out_dtype": out_dtype} if out_dtype else {}))
    plait.merge(asked, tmp_path / "fast", threads=2)
    assert used["pieces"] >= len(SHAPES) - 2, "the loops were not used"  # one is empty; DELLA leaves one to torch
    count = used["pieces"]
    monkeypatch.setenv(native.OFF, "0")
    plait.merge(asked, tmp_path / "slow", threads=1)
    assert used["pieces"] == count
    assert digest(tmp_path / "fast") == digest(tmp_path / "slow")


def test_linear_is_a_float32_sum_rounded_once(models: Path, tmp_path: Path) -> None:
    plait.merge(recipe(models / "bfloat16", "linear", {"weight": [0.2, 0.3, 0.5]}), tmp_path / "out")
    from safetensors.torch import load_file

    parts = [load_file(models / "bfloat16" / name / "model.safetensors") for name in "abc"]
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name in SHAPES:
        total = np.float32(0.2) * parts[0][name].float().numpy()
        for weight, part in zip((0.3, 0.5), parts[1:], strict=True):
            total = total + np.float32(weight) * part[name].float().numpy()
        want = torch.from_numpy(total / np.float32(0.2 + 0.3 + 0.5)).bfloat16()
        assert torch.equal(merged[name].view(torch.int16), want.view(torch.int16)), name


def alone(folder: Path, values: torch.Tensor) -> Path:
    """A model of one tensor."""
    folder.mkdir()
    save_file({"a": values}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def linear(folder: Path, values: torch.Tensor, out_dtype: str) -> torch.Tensor:
    """One model, merged with itself by the loops, in another type."""
    from safetensors.torch import load_file

    asked = {"merge_method": "linear", "models": [{"model": str(alone(folder, values))}], "out_dtype": out_dtype}
    merge, pieces = Worker.merge, []

    def counted(self: Worker, *arguments: Any) -> memoryview:
        pieces.append(arguments)
        return merge(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "merge", counted)
        plait.merge(asked, folder / "out")
    assert pieces, "the loops were not used"
    return load_file(folder / "out" / "model.safetensors")["a"]


class TestHalf:
    def test_every_number_is_widened(self, tmp_path: Path) -> None:
        words = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
        numbers = words[torch.isfinite(words)]
        assert len(numbers) == 2 * 31 * 1024
        found = linear(tmp_path / "all", numbers, "float32")
        assert torch.equal(found.view(torch.int32), numbers.float().view(torch.int32))

    def test_rounding_is_to_nearest_even(self, tmp_path: Path) -> None:
        numbers = torch.arange(0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
        middle = (numbers[1:] + numbers[:-1]) / 2  # ties, of subnormal numbers too
        near = [torch.nextafter(middle, torch.full_like(middle, way)) for way in (-1e30, 1e30)]
        noise = torch.randint(0, 0x477FEFFF, (200_000,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
        edge = torch.tensor([65519.99, 2.0**-25, 2.0**-26, 1e-40, 0.0, 6.1e-5, 2.0**-14])
        values = torch.cat([numbers, middle, *near, noise.view(torch.float32), edge])
        values = torch.cat([values, -values])
        found = linear(tmp_path / "near", values, "float16")
        assert torch.equal(found.view(torch.int16), values.half().view(torch.int16))

    @pytest.mark.parametrize("loops", [True, False])
    @pytest.mark.parametrize("method", ["linear", "ties"])
    def test_what_is_too_large_is_told(
        self, loops: bool, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not loops:
            monkeypatch.setenv(native.OFF, "0")
        values = torch.linspace(1, 40000, 300_000).half()
        models = [str(alone(tmp_path / name, values + number)) for number, name in enumerate("abc")]
        asked: dict[str, Any] = {"merge_method": method, "models": [{"model": one} for one in models[1:]]}
        if method == "ties":
            asked |= {"base_model": str(alone(tmp_path / "zero", torch.zeros_like(values)))}
        asked["parameters"] = {"normalize": False, "weight": 0.9, **({"density": 0.5} if method == "ties" else {})}
        with pytest.raises(MachineError, match=r"'a': merged values exceed float16 .* set out_dtype"):
            plait.merge(asked, tmp_path / "out", threads=1)
        assert not (tmp_path / "out").exists()
        plait.merge({**asked, "out_dtype": "float32"}, tmp_path / "out", threads=1)


def test_what_the_loops_do_not_know_is_left_out_on_purpose() -> None:
    static = {name for name, method in all_methods().items() if method.learned is None and method.dynamic is None}
    matrices = {"tsv_m", "iso_c", "iso_cts", "wudi", "knots"}
    geodesic = {"slerp", "nuslerp", "multislerp", "karcher", "model_stock"}
    others = {"anchor_schedule", "awd", "nearswap", "passthrough"}
    assert static - {method for method, _ in CASES} == matrices | geodesic | others


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
def test_a_number_that_is_not_finite_is_named(kind: str, models: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / kind
    for name in ("base", "a", "b", "c"):
        tensors = load_file(models / kind / name / "model.safetensors")
        if name == "b":
            tensors["a.weight"][7, 13] = float("nan")
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text("{}")
    for method in ("task_arithmetic", "ties", "della"):
        with pytest.raises(CheckpointError, match=r"a\.weight' holds NaN at \[7, 13\]"):
            plait.merge(recipe(folder, method, {"density": 0.5} if method != "task_arithmetic" else {}), tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("fault", "says"),
    [(OSError(errno.EIO, "Input/output error"), "cannot be read"), (0, "too short while it was read")],
    ids=["error", "cut"],
)
def test_a_read_that_fails_is_told_and_gone_on_from(
    fault: Any, says: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(models / "bfloat16", "ties", {"density": 0.2})
    read, calls, last = os.preadv, Counter[str](), [10**9]

    def failing(file: int, *arguments: Any) -> int:
        """Inputs alone, and read by jobs: when the output is read back, or the next tensor looked for, is chance."""
        job = threading.current_thread().name.startswith("ThreadPool")
        calls["reads"] += job and Path(os.readlink(f"/proc/self/fd/{file}")).is_relative_to(models.resolve())
        if not job or calls["reads"] <= last[0]:
            return read(file, *arguments)
        if isinstance(fault, OSError):
            raise fault
        return fault

    monkeypatch.setattr(os, "preadv", failing)
    plait.merge(asked, tmp_path / "whole", threads=1)
    last[0], calls["reads"] = calls["reads"] * 2 // 3, 0
    with pytest.raises(CheckpointError, match=says):
        plait.merge(asked, tmp_path / "out", threads=1)
    monkeypatch.setattr(os, "preadv", read)
    assert not (tmp_path / "out").exists()
    assert plait.merge(asked, tmp_path / "out", threads=1).resumed
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_without_a_compiler_torch_does_it(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_loaded", lambda: None)
    monkeypatch.setattr(native, "_compile", lambda: False)
    plait.merge(recipe(models / "bfloat16", "average", {}), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


class TestSelection:
    @pytest.mark.parametrize("wanted", [1, 5, 99_999, 50_000, 199_999])
    @pytest.mark.parametrize("what", ["normal", "few", "rows"])
    def test_the_cut_is_that_of_the_histograms(self, wanted: int, what: str, models: Path) -> None:
        noise = np.random.default_rng(wanted)
        values = {
            "normal": noise.normal(size=(1, 200_000)),
            "few": noise.integers(-4, 5, size=(1, 200_000)) / 8,
            "rows": noise.normal(size=(1, 200_000)) * np.repeat(10.0 ** noise.integers(-4, 3, 200), 1000),
        }[what].astype(np.float32)
        cut = _by_tally(values, wanted)
        search = Histograms([[wanted]], values.size)
        search.choose(Histograms.high(torch.from_numpy(values).abs()))
        ((want,),) = search.cuts(search.low(torch.from_numpy(values).abs()))
        if cut is None:
            # Runs of like magnitudes mislead the samples; then the histograms decide, and nothing is left to compare.
            assert what == "rows"
            return
        assert (cut.bits, cut.quota, cut.equals) == (want.bits, want.quota, want.equals)


def _by_tally(values: np.ndarray, wanted: int) -> Cut | None:
    from plait.kernels.fused import Raw, Stored
    from plait.methods.block import Block

    zeros = np.zeros_like(values[0])

    def over(array: np.ndarray) -> Stored:
        data = array.tobytes()

        def read(start: int, buffer: memoryview) -> None:
            buffer[:] = data[4 * start : 4 * start + len(buffer)]

        return Stored(0, 4, read)

    compiled = native.loops()
    assert compiled is not None
    block = Block.of([torch.from_numpy(row) for row in values], torch.from_numpy(zeros))
    block.raw = Raw(Worker(compiled), [over(row) for row in values], over(zeros), 0)
    fused = block.deltas.fused
    assert fused is not None
    found = selection.largest(fused, [[wanted]], Cut, trivial)
    return None if found is None else found[0][0]


class TestDraws:
    def test_are_uniform_and_do_not_follow_one_another(self) -> None:
        x = draws.uniform(draws.key_of(0, "w", "a"), 0, 1 << 20).astype(np.float64)
        n = len(x)
        counts = np.bincount((x * 1024).astype(int), minlength=1024)
        chi = float(((counts - n / 1024) ** 2 / (n / 1024)).sum())
        assert 800 < chi < 1250  # 1023 degrees of freedom: 1023 ± 45
        for lag in (1, 2, 3, 64, 1024, 4096):
            assert abs(np.corrcoef(x[:-lag], x[lag:])[0, 1]) < 5 / np.sqrt(n)
        bits = (x * 2**24).astype(np.int64)
        for bit in range(24):
            assert abs(float((bits >> bit & 1).mean()) - 0.5) < 2.5 / np.sqrt(n)

    def test_of_different_keys_and_halves_have_nothing_in_common(self) -> None:
        n = 1 << 18
        runs = [
            draws.uniform(draws.key_of(*key), 0, n)
            for key in ((0, "w", "a"), (1, "w", "a"), (0, "v", "a"), (0, "w", "b"))
        ]
        runs.append(draws.uniform(draws.key_of(0, "w", "a"), 1 << 32, (1 << 32) + n))
        for i, one in enumerate(runs):
            for other in runs[:i]:
                assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(n)

    def test_across_a_multiple_of_two_to_the_32(self) -> None:
        key, at = draws.key_of(3, "w", "a"), 1 << 32
        whole = draws.uniform(key, at - 100, at + 100)
        assert np.array_equal(
            whole, np.concatenate([draws.uniform(key, at - 100, at), draws.uniform(key, at, at + 100)])
        )
