"""NaN and infinities in an input: refused by name; with --allow-nonfinite in their places, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_methods import EXTRA, STATIC

import plait
from plait.errors import CheckpointError, RecipeError
from plait.methods import get_method

NAN, INF = float("nan"), float("inf")
SHAPES = {"layers.0.weight": (16, 9), "layers.1.weight": (9, 16), "norm.weight": (12,), "scale": ()}
BAD: dict[str, list[tuple[str, tuple[int, ...], float]]] = {
    "base": [("layers.0.weight", (3, 2), NAN)],
    "a": [("layers.0.weight", (0, 0), INF), ("layers.1.weight", (8, 15), -INF), ("norm.weight", (4,), NAN)],
    "b": [("layers.0.weight", (0, 0), -INF), ("layers.1.weight", (2, 2), INF), ("layers.1.weight", (8, 15), -INF)],
}
"""Model → tensor, place and value. At layers.0[0, 0] the infinities differ in sign, at layers.1[8, 15] they agree."""


def write(folder: Path, *, spoiled: bool, only: str | None = None) -> dict[str, Any]:
    """Base and two experts. Not spoiled: all of them are zero wherever one of them would be."""
    random = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
    for model in ("base", "a", "b"):
        noise = {name: 0.1 * torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
        tensors = {name: (base[name] + (noise[name] if model != "base" else 0)).clone() for name in SHAPES}
        for owner, places in BAD.items():
            for name, place, value in places:
                if owner == only or only is None:
                    tensors[name][place] = (
                        value if spoiled and owner == model else 0.0 if not spoiled else tensors[name][place]
                    )
        (folder / model).mkdir(parents=True)
        save_file(tensors, folder / model / "model.safetensors")
    return {"base_model": str(folder / "base"), "models": [{"model": str(folder / "a")}, {"model": str(folder / "b")}]}


def recipe(name: str, data: dict[str, Any]) -> dict[str, Any]:
    method = get_method(name)
    models = data["models"][: method.experts[1]]
    more = {"density": 0.6, "epsilon": 0.1, "steps": 20}
    parameters = {**{k: v for k, v in more.items() if k in method.parameters}, **EXTRA.get(name, {})}
    if "anchor" in parameters:
        parameters["anchor"] = "a"
    return {**data, "models": models, "merge_method": name, "parameters": parameters}


@pytest.mark.parametrize("name", STATIC)
def test_passes_through_without_spreading(name: str, tmp_path: Path) -> None:
    spoiled, clean = (write(tmp_path / kind, spoiled=kind == "spoiled") for kind in ("spoiled", "clean"))
    used = ["a", "b"][: get_method(name).experts[1]] + ([] if get_method(name).base == "unused" else ["base"])
    with pytest.raises(CheckpointError, match=r"holds (NaN|an infinity) at \["):
        plait.merge(recipe(name, spoiled), tmp_path / "refused")
    found = plait.merge(recipe(name, spoiled), tmp_path / "out", allow_nonfinite=True)
    got = load_file(found.path / "model.safetensors")
    want = load_file(plait.merge(recipe(name, clean), tmp_path / "clean-out").path / "model.safetensors")
    places = {(tensor, place) for owner in used for tensor, place, _ in BAD[owner]}
    for tensor in SHAPES:
        lost = torch.zeros(SHAPES[tensor], dtype=torch.bool)
        for other, place in places:
            if other == tensor:
                lost[place] = True
        assert torch.equal(~torch.isfinite(got[tensor]), lost), tensor
        if all(place in {p for t, p in places if t == tensor} for o in BAD for t, place, _ in BAD[o] if t == tensor):
            assert torch.equal(got[tensor][~lost], want[tensor][~lost]), tensor
    record = json.loads((found.path / "plait.json").read_text())["nonfinite"]
    assert record == {t: n for t in SHAPES if (n := len({p for o, p in places if o == t}))}
    assert sum("no finite numbers" in note for note in found.notes) == len(record)


def test_the_value_is_what_was_there(tmp_path: Path) -> None:
    data = write(tmp_path, spoiled=True)
    got = load_file(
        plait.merge(recipe("linear", data), tmp_path / "out", allow_nonfinite=True).path / "model.safetensors"
    )
    assert got["layers.1.weight"][8, 15] == -INF
    assert got["layers.1.weight"][2, 2] == INF
    assert got["layers.0.weight"][0, 0].isnan(), "infinities of both signs"
    assert got["norm.weight"][4].isnan()


def test_clean_inputs_give_the_same_bytes_with_it(llama: dict[str, Path], tmp_path: Path) -> None:
    data = {"merge_method": "ties", "base_model": str(llama["base"]), "models": [{"model": str(llama["one"])}]}
    plain, allowed = (plait.merge(data, tmp_path / str(on), allow_nonfinite=on) for on in (False, True))
    assert plain.hashes == allowed.hashes
    for name in ("plait.json", "README.md"):
        assert (plain.path / name).read_bytes() == (allowed.path / name).read_bytes()


def test_float16_infinities_pass_and_overflow_does_not(tmp_path: Path) -> None:
    data = {**recipe("linear", write(tmp_path, spoiled=True)), "out_dtype": "float16"}
    got = load_file(plait.merge(data, tmp_path / "out", allow_nonfinite=True).path / "model.safetensors")
    assert got["layers.1.weight"].dtype == torch.float16
    assert int((~torch.isfinite(got["layers.1.weight"])).sum()) == 2


def test_methods_that_learn_or_route_refuse_it(tmp_path: Path) -> None:
    data = write(tmp_path, spoiled=True)
    for name in ("adamerging", "emr"):
        with pytest.raises(RecipeError, match=r"--allow-nonfinite: .* learns or routes"):
            plait.merge({**data, "merge_method": name}, tmp_path / "out", allow_nonfinite=True)
