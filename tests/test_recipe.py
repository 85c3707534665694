"""Recipes: mergekit's grammar means what it means there; whatever is wrong is refused with line, key and next step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import transformers
from safetensors.torch import load_file

import plait
from plait.errors import RecipeError
from plait.methods.compose import method_of
from plait.recipe import load_recipe
from plait.settings import Resolver

GOOD = """\
merge_method: ties
base_model: {base}
models:
  - model: {one}
    name: one
    parameters: {{density: [1, 0.7, 0.1]}}
  - model: {two}
    parameters:
      weight: [{{filter: mlp, value: 0.5}}, {{value: 0.2}}]
parameters: {{normalize: true}}
dtype: float32
"""


def write(tmp_path: Path, text: str, llama: dict[str, Path]) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text.format(**llama) if "{base}" in text or "{one}" in text else text)
    return path


BROKEN = [
    # (what is replaced in GOOD, by what, what the error must say)
    (
        "merge_method: ties",
        "merge_metod: ties",
        r"line 1: merge_metod: unknown key 'merge_metod'; did you mean 'merge_method'",
    ),
    ("merge_method: ties", "merge_method: tise", r"unknown method 'tise'; did you mean 'ties'"),
    (
        "density:",
        "densty:",
        r"line 6: models\[0\]\.parameters\.densty: ties has no parameter 'densty'; did you mean 'density'",
    ),
    ("[1, 0.7, 0.1]", "7", r"line 6: models\[0\]\.parameters\.density: must be a number in \[0, 1\], got 7"),
    ("[1, 0.7, 0.1]", "[1, nonsense]", r"density\[1\]: must be a number in \[0, 1\], got 'nonsense'"),
    ("[1, 0.7, 0.1]", "[]", r"the list is empty"),
    ("[1, 0.7, 0.1]", "[1, {{value: 2}}]", r"either values \(a gradient\) or filters, not both"),
    ("filter: mlp", "filter: mpl", r"line 9: .*'mpl' is part of no merged tensor's name; did you mean 'mlp'"),
    ("filter: mlp", "fliter: mlp", r"unknown key 'fliter'; did you mean 'filter'"),
    ("normalize: true", "normalize: 3", r"parameters\.normalize: must be true or false, got 3"),
    ("normalize: true", "weight: [1, -1]", None),
    ("dtype: float32", "dtype: float23", r"line 11: dtype: 'float23' is not a floating type; did you mean 'float32'"),
    ("dtype: float32", "dtyp: float32", r"unknown key 'dtyp'; did you mean 'dtype'"),
    ("dtype: float32", "seed: -1", r"seed: must be greater than or equal to 0, got -1"),
    ("dtype: float32", "seed: 1\nseed: 2", r"line 12: the key 'seed' is given twice"),
    ("dtype: float32", "keep: {{base: [nowhere]}}", r"keep\.base\[0\]: 'nowhere' is part of no tensor's name"),
    ("dtype: float32", "keep: {{bse: [a]}}", r"unknown key 'bse'; did you mean 'base'"),
    ("dtype: float32", "dtype: !!python/object:os.system x", r"not plain data"),
    ("dtype: float32", "dtype: [", r"not valid YAML"),
    ("dtype: float32", "modules: {{}}", r"modules"),
    ("name: one", "name: ../one", r"must be letters"),
    ("base_model: {base}\n", "", r"base_model: ties works on task vectors; add base_model"),
    ("  - model: {two}", "  - model: {one}", r"is listed twice"),
    ("models:", "slices: []\nmodels:", r"either models or slices"),
]


@pytest.mark.parametrize(("old", "new", "message"), [b for b in BROKEN if b[2]], ids=lambda v: str(v)[:24])
def test_what_is_wrong_is_refused_and_explained(
    old: str, new: str, message: str, llama: dict[str, Path], tmp_path: Path
) -> None:
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new), llama)
    with pytest.raises(RecipeError, match=message):
        plait.make_plan(load_recipe(path))


def test_the_good_recipe_is_good(llama: dict[str, Path], tmp_path: Path) -> None:
    plan = plait.make_plan(load_recipe(write(tmp_path, GOOD, llama)))
    by_name = {t.name: t.keywords for t in plan.tensors}
    assert [item.model for item in plan.merged[0].inputs] == ["expert1", "one"]
    first, last = (by_name[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 2))
    assert first["density"] == [1.0, 1.0]
    assert last["density"] == [1.0, pytest.approx(0.1)]
    assert by_name["model.layers.1.mlp.up_proj.weight"]["density"][1] == pytest.approx(0.7)
    assert first["weight"] == [0.5, 1.0]
    assert by_name["model.norm.weight"]["weight"] == [0.2, 1.0]
    assert by_name["lm_head.weight"]["density"] == [1.0, 1.0], "outside the layers t is 0, as in mergekit"


def test_weights_that_sum_to_zero_are_refused(llama: dict[str, Path]) -> None:
    models = [
        {"model": str(llama["one"]), "parameters": {"weight": 1}},
        {"model": str(llama["two"]), "parameters": {"weight": -1}},
    ]
    with pytest.raises(
        RecipeError, match=r"models\[0\]\.parameters\.weight: the weights \[1\.0, -1\.0\] .* sum to zero"
    ):
        plait.make_plan(load_recipe({"merge_method": "linear", "models": models}))


def test_precedence_source_slice_recipe_default(llama: dict[str, Path]) -> None:
    data = {
        "merge_method": "linear",
        "slices": [
            {
                "sources": [
                    {"model": str(llama["one"]), "layer_range": [0, 2], "parameters": {"weight": 3}},
                    {"model": str(llama["two"]), "layer_range": [0, 2]},
                ],
                "parameters": {"weight": 2},
            },
            {
                "sources": [
                    {"model": str(llama["one"]), "layer_range": [2, 3]},
                    {"model": str(llama["two"]), "layer_range": [2, 3]},
                ]
            },
        ],
        "parameters": {"weight": [{"filter": "mlp", "value": 5}], "normalize": False},
    }
    plan = plait.make_plan(load_recipe(data))
    by_name = {t.name: t.keywords["weight"] for t in plan.tensors}
    assert by_name["model.layers.0.mlp.up_proj.weight"] == [3, 2]
    assert by_name["model.layers.2.mlp.up_proj.weight"] == [5, 5]
    assert by_name["model.layers.2.self_attn.q_proj.weight"] == [1.0, 1.0]
    assert by_name["model.embed_tokens.weight"] == [3, 2]


def test_layer_stacking_renumbers_and_updates_the_config(llama: dict[str, Path], tmp_path: Path) -> None:
    one, two = llama["one"], llama["two"]
    slices = [
        {"sources": [{"model": str(one), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(two), "layer_range": [0, 3]}]},
        {"sources": [{"model": str(one), "layer_range": [2, 3]}]},
    ]
    made = plait.merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "tall")
    got, first, second = (load_file(p / "model.safetensors") for p in (made.path, one, two))
    origin = [(first, 0), (first, 1), (second, 0), (second, 1), (second, 2), (first, 2)]
    for i, (source, j) in enumerate(origin):
        for name, values in source.items():
            if f"layers.{j}." in name:
                assert torch.equal(got[name.replace(f"layers.{j}.", f"layers.{i}.")], values)
    assert torch.equal(got["lm_head.weight"], first["lm_head.weight"])
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(made.path, output_loading_info=True)
    model, info = loaded
    assert model.config.num_hidden_layers == 6
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_layers_that_are_not_there_are_named(llama: dict[str, Path]) -> None:
    slices = [{"sources": [{"model": str(llama["one"]), "layer_range": [1, 5]}]}]
    with pytest.raises(plait.PlaitError, match=r"has no .model\.layers\.3\..*of 3 layers.*layer_range"):
        plait.make_plan(load_recipe({"merge_method": "passthrough", "slices": slices}))


def test_recipes_are_data_in_yaml_json_or_python(llama: dict[str, Path], tmp_path: Path) -> None:
    text = GOOD.format(**llama)
    (tmp_path / "r.yaml").write_text(text)
    import yaml

    data = yaml.safe_load(text)
    (tmp_path / "r.json").write_text(json.dumps(data))
    loaded = [load_recipe(tmp_path / "r.yaml"), load_recipe(tmp_path / "r.json"), load_recipe(data)]
    assert len({json.dumps(r.canonical(), sort_keys=True) for r in loaded}) == 1
    with pytest.raises(RecipeError, match="plain data"):
        load_recipe({"merge_method": "linear", "models": [object()]})


def test_mergekits_harmless_parameters_are_noted_not_refused(llama: dict[str, Path]) -> None:
    data = {
        "merge_method": "ties",
        "base_model": str(llama["base"]),
        "models": [
            {"model": str(llama["base"])},
            {"model": str(llama["one"]), "parameters": {"weight": 1, "density": "5e-1"}},
        ],
        "parameters": {"int8_mask": True},
    }
    plan = plait.make_plan(load_recipe(data))
    assert any("int8_mask" in note for note in plan.notes)
    assert plan.merged[0].keywords["density"] == [0.5]
    assert len(plan.merged[0].inputs) == 1, "the base listed among the models is not an expert of itself"


COMPOSED: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"transforms": [{"trim": {"density": 0.3}}], "combine": "elect"}, "ties", {"density": 0.3}),
    (
        {"transforms": [{"trim": {"density": 0.3, "trim": "model"}}], "combine": "elect"},
        "ties",
        {"density": 0.3, "trim": "model"},
    ),
    (
        {"transforms": [{"drop": {"density": 0.5}}], "combine": "sum", "finish": [{"scale": {"lambda": 0.4}}]},
        "dare_linear",
        {"density": 0.5, "lambda": 0.4},
    ),
    ({"transforms": ["consensus"], "combine": {"sum": {"weight": 0.3}}}, "consensus", {"weight": 0.3}),
    (
        {"transforms": [{"magprune": {"density": 0.5}}], "combine": {"elect": {"normalize": True}}},
        "della",
        {"density": 0.5},
    ),
    ({"combine": "multislerp"}, "multislerp", {}),
]


@pytest.mark.parametrize(("spelt", "name", "parameters"), COMPOSED, ids=[c[1] for c in COMPOSED])
def test_spelt_out_methods_are_the_named_ones(
    spelt: dict[str, Any], name: str, parameters: dict[str, Any], llama: dict[str, Path], tmp_path: Path
) -> None:
    common = {"base_model": str(llama["base"]), "models": [{"model": str(llama[k])} for k in ("one", "two", "three")]}
    spelt_out = plait.merge({**common, **spelt}, tmp_path / "spelt")
    named = plait.merge({**common, "merge_method": name, "parameters": parameters}, tmp_path / "named")
    assert spelt_out.hashes == named.hashes


@pytest.mark.parametrize(
    ("spelt", "message"),
    [
        ({"combine": "elec"}, "there is no stage 'elec'; did you mean 'elect'"),
        ({"transforms": [{"trim": {"densty": 1}}], "combine": "sum"}, "did you mean 'density'"),
        ({"transforms": ["trim", "trim"], "combine": "sum"}, "used twice"),
        ({"transforms": [{"trim": 3}], "combine": "sum"}, "must be a mapping"),
        ({"transforms": ["drop", {"trim": {"trim": "model"}}], "combine": "sum"}, "trim must be the first"),
        ({"transforms": ["trim"]}, "either merge_method, or combine"),
    ],
)
def test_composed_recipes_are_as_strict(
    spelt: dict[str, Any], message: str, llama: dict[str, Path], tmp_path: Path
) -> None:
    common = {"base_model": str(llama["base"]), "models": [{"model": str(llama["one"])}, {"model": str(llama["two"])}]}
    with pytest.raises(RecipeError, match=message):
        plait.merge({**common, **spelt}, tmp_path / "out")


def test_shared_parameter_names_go_by_their_stage(llama: dict[str, Path]) -> None:
    data = {
        "base_model": str(llama["base"]),
        "models": [{"model": str(llama["one"]), "parameters": {"drop.density": 0.9}}, {"model": str(llama["two"])}],
        "transforms": [{"trim": {"density": 0.5}}, {"drop": {"density": 0.6}}],
        "combine": "sum",
    }
    method, recipe = method_of(load_recipe(data))
    values = Resolver(recipe, method, recipe.names()).keywords("w", 0.0, ["expert0", "expert1"], {})
    assert values["trim__density"] == [0.5, 0.5]
    assert values["drop__density"] == [0.9, 0.6]


def test_names_are_made_unique_from_the_paths(tmp_path: Path) -> None:
    data = {"merge_method": "linear", "models": [{"model": "a/mnist"}, {"model": "b/mnist"}, {"model": "org/x@main"}]}
    assert sorted(load_recipe(data).names().values()) == ["a-mnist", "b-mnist", "x"]


def test_keep_decides_what_is_not_merged(llama: dict[str, Path], tmp_path: Path) -> None:
    data = {
        "merge_method": "linear",
        "base_model": str(llama["base"]),
        "models": [{"model": str(llama["one"])}, {"model": str(llama["two"])}],
        "keep": {"base": ["lm_head"], "per_task": ["model.norm"]},
    }
    made = plait.merge(data, tmp_path / "out")
    got, base, one = (load_file(p / "model.safetensors") for p in (made.path, llama["base"], llama["one"]))
    assert torch.equal(got["lm_head.weight"], base["lm_head.weight"])
    head = load_file(made.path / "heads" / "expert0.safetensors")
    assert torch.equal(head["model.norm.weight"], one["model.norm.weight"])


def test_tied_models_stay_tied(tmp_path: Path) -> None:
    base = pico.make_llama(tmp_path / "base", tied=True)
    models = pico.experts(tmp_path / "e", base, 2)
    made = plait.merge(
        {"merge_method": "dare_linear", "base_model": str(base), "models": [{"model": str(m)} for m in models],
         "parameters": {"density": 0.5}},
        tmp_path / "out",
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(made.path)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
