"""Every verb as people and programs call it: the output, the JSON, the exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pico
import pytest
import torch
import yaml
from calls import Call
from safetensors.torch import load_file, save_file

import plait
from plait import progress
from plait.methods import all_methods


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, expert-a, expert-b, expert-c: the names that `plait init` writes."""
    root = tmp_path_factory.mktemp("models")
    base = pico.make_llama(root / "base")
    for letter, folder in zip("abc", pico.experts(root, base, 3), strict=True):
        folder.rename(root / f"expert-{letter}")
    return root


@pytest.fixture
def recipe(models: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    data = {
        "merge_method": "ties",
        "base_model": str(models / "base"),
        "models": [
            {"model": str(models / "expert-a"), "name": "a", "parameters": {"density": [0.9, 0.3]}},
            {"model": str(models / "expert-b"), "name": "b"},
        ],
        "parameters": {"density": 0.5},
        "keep": {"base": ["lm_head"], "per_task": ["model.norm"]},
        "out_dtype": "bfloat16",
    }
    path.write_text(yaml.safe_dump(data))
    return path


def data_bytes(folder: Path) -> int:
    """Bytes of tensors in a folder's weight files: the files without their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            (header,) = struct.unpack("<Q", file.read(8))
        total += path.stat().st_size - 8 - header
    return total


class TestInit:
    @pytest.mark.parametrize("name", all_methods())
    def test_what_is_printed_merges_as_it_is(self, name: str, call: Call, models: Path, tmp_path: Path) -> None:
        printed = call("init", name)
        assert (printed.code, printed.err) == (0, "")
        method = all_methods()[name]
        assert method.summary in printed.out.splitlines()[0]
        path = models / f"{name}.yaml"  # beside the folders it names
        path.write_text(printed.out)
        written = yaml.safe_load(printed.out)
        assert written["merge_method"] == name
        assert set(written.get("parameters", {})) == set(method.parameters), "every parameter is shown"
        assert ("base_model" in written) == (method.base != "unused")
        if method.learned is not None:
            assert set(written["fit"]) == set(method.learned.parameters)
            assert call("check", path).code == 0
            return
        if method.dynamic is not None:
            given = {key for key, option in method.dynamic.parameters.items() if option.default is not None}
            assert set(written["route"]) == given
            assert call("check", path).code == 0
            return
        made = call("merge", path, tmp_path / "out")
        assert (made.code, made.err) == (0, "")
        got, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", models / "base"))
        assert got.keys() == base.keys()
        changed = [n for n, values in got.items() if not torch.equal(values, base[n])]
        assert len(changed) > len(got) / 2, "a recipe to start from must do something"
        assert all(torch.isfinite(values).all() for values in got.values())

    def test_task_arithmetic_is_the_one_to_start_with(self, call: Call) -> None:
        assert call("init").out == call("init", "task_arithmetic").out

    def test_unknown_method(self, call: Call) -> None:
        result = call("init", "tise")
        assert (result.code, result.out) == (2, "")
        assert "did you mean 'ties'" in result.err


class TestCheck:
    def test_json(self, call: Call, recipe: Path, models: Path) -> None:
        result = call("check", recipe, "--json")
        assert (result.code, result.err) == (0, "")
        assert result.data == {
            "ok": True,
            "method": "ties",
            "base": str(models / "base"),
            "models": {
                letter: {"from": str(models / f"expert-{letter}"), "names": "21 of 21 names"} for letter in "ab"
            },
            "merged": 19,
            "copied": 2,
            "per_task": {"a": ["model.norm.weight"], "b": ["model.norm.weight"]},
            "notes": [],
        }

    def test_text(self, call: Call, recipe: Path, models: Path) -> None:
        result = call("check", recipe)
        assert result.code == 0
        assert "ok  ties: 19 tensors merged, 2 copied" in result.out
        assert str(models / "expert-b") in result.out

    def test_what_does_not_fit(self, call: Call, models: Path, tmp_path: Path) -> None:
        for words in ((), ("--json",)):
            result = call("check", broken(models, tmp_path), *words)
            assert (result.code, result.out) == (3, "")
            assert "'model.norm.weight' is [33], but [32] in" in result.err


def broken(models: Path, folder: Path) -> Path:
    """A recipe with an expert whose norm has another shape."""
    bad = folder / "bad"
    if not bad.exists():
        bad.mkdir()
        tensors = load_file(models / "expert-b" / "model.safetensors")
        tensors["model.norm.weight"] = torch.zeros(33)
        save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    data = {"merge_method": "task_arithmetic", "base_model": str(models / "base"), "models": [{"model": str(bad)}]}
    (folder / "broken.json").write_text(json.dumps(data))
    return folder / "broken.json"


PLAN_KEYS = {
    "ok", "method", "base", "models", "merged", "copied", "per_task", "notes", "bytes_in", "bytes_out",
    "buffers_peak", "least_memory", "least_memory_tensor", "fits", "seconds_estimate", "refused", "tensors",
}  # fmt: skip


class TestPlan:
    @pytest.mark.parametrize("name", ["ties", "della", "slerp", "linear"])
    def test_the_merge_does_what_the_plan_says(self, name: str, call: Call, models: Path, tmp_path: Path) -> None:
        path = models / f"{name}-plan.yaml"
        path.write_text(call("init", name).out.replace("out_dtype: base", "out_dtype: float16"))
        planned = call("plan", path, "--json")
        assert (planned.code, planned.err) == (0, "")
        data = planned.data
        assert set(data) == PLAN_KEYS
        assert call("merge", path, tmp_path / "out", "-q").code == 0
        got = load_file(tmp_path / "out" / "model.safetensors")
        names = {torch.float16: "F16", torch.float32: "F32"}
        assert {t["name"]: (t["shape"], t["dtype"]) for t in data["tensors"]} == {
            n: (list(values.shape), names[values.dtype]) for n, values in got.items()
        }
        assert data["bytes_out"] == data_bytes(tmp_path / "out")
        count = len(data["models"]) + (data["base"] is not None)
        assert data["bytes_in"] == count * data_bytes(models / "base")
        record = json.loads((tmp_path / "out" / "plait.json").read_text())
        assert (record["tensors"]["merged"], len(record["tensors"]["copied"])) == (data["merged"], data["copied"])
        assert data["fits"] is True
        assert 0 < data["least_memory"] <= data["buffers_peak"] <= 512 * 10**6
        assert data["least_memory_tensor"] in got
        assert data["seconds_estimate"] > 0

    def test_json_of_every_tensor(self, call: Call, recipe: Path, models: Path, tmp_path: Path) -> None:
        data = call("plan", recipe, "--json").data
        tensors = {tensor["name"]: tensor for tensor in data["tensors"]}
        assert call("merge", recipe, tmp_path / "out", "-q").code == 0
        got = load_file(tmp_path / "out" / "model.safetensors")
        assert set(tensors) == set(got)
        assert data["bytes_out"] == data_bytes(tmp_path / "out")
        first = tensors["model.layers.0.mlp.up_proj.weight"]
        assert first == {
            "name": "model.layers.0.mlp.up_proj.weight",
            "action": "merge",
            "reason": "2 models",
            "shape": [pico.FEED_FORWARD, pico.WIDTH],
            "dtype": "BF16",
            "from": dict.fromkeys("ab", "model.layers.0.mlp.up_proj.weight"),
            "base": "model.layers.0.mlp.up_proj.weight",
            "parameters": {
                "weight": [1.0, 1.0],
                "density": [0.9, 0.5],
                "normalize": True,
                "rescale": False,
                "lambda": 1.0,
                "trim": "tensor",
            },
        }
        assert tensors["model.layers.1.mlp.up_proj.weight"]["parameters"]["density"] == [pytest.approx(0.3), 0.5]
        base = load_file(models / "base" / "model.safetensors")
        copied = {name: tensor["reason"] for name, tensor in tensors.items() if tensor["action"] == "copy"}
        assert copied == {
            "lm_head.weight": "kept from the base",
            "model.norm.weight": "kept per task; the base's here",
        }
        for name in copied:
            assert torch.equal(got[name], base[name].bfloat16())
        for task, items in data["per_task"].items():
            assert set(load_file(tmp_path / "out" / "heads" / f"{task}.safetensors")) == set(items)

    def test_text(self, call: Call, recipe: Path) -> None:
        grouped, every = call("plan", recipe), call("plan", recipe, "--tensors", "--threads", 3, "--memory", "1GB")
        line = next(line for line in grouped.out.splitlines() if line.startswith(" model.layers.*.mlp.up_proj.weight"))
        assert re.search(r" 2 +64×32 BF16 +merge +2 models +density \(0\.9, 0\.5\) → \(0\.3, 0\.5\)", line)
        assert "model.layers.0.mlp.up_proj.weight" not in grouped.out
        for layer in (0, 1):
            assert f"model.layers.{layer}.mlp.up_proj.weight" in every.out
        assert "kept from the base" in grouped.out
        assert re.search(r"reads \d.* [KM]B, writes \d.* KB; buffers .* of 512 MB, beside about", grouped.out)
        assert re.search(r"of 1\.0 GB, .*on\s+3 thread\(s\)", every.out, re.DOTALL)

    def test_memory_that_is_too_small_is_told(self, call: Call, recipe: Path) -> None:
        data = call("plan", recipe, "--json", "--memory", "1KB").data
        assert data["fits"] is False
        assert "needs at least" in call("plan", recipe, "--memory", "1KB").out

    def test_what_does_not_fit_is_listed(self, call: Call, models: Path, tmp_path: Path) -> None:
        result = call("plan", broken(models, tmp_path), "--json")
        assert result.code == 3
        assert result.data["ok"] is False
        assert list(result.data["refused"]) == ["model.norm.weight"]
        assert "'model.norm.weight' is [33], but [32] in" in result.data["refused"]["model.norm.weight"]
        assert len(result.data["tensors"]) == 20
        assert result.data["refused"]["model.norm.weight"] in result.err

    def test_text_of_what_does_not_fit_is_whole(self, call: Call, models: Path, tmp_path: Path) -> None:
        text = call("plan", broken(models, tmp_path)).out
        assert "[model.norm.weight]" in re.sub(r"\s+", "", text)


class TestMerge:
    def test_json(self, call: Call, recipe: Path, tmp_path: Path) -> None:
        result = call("merge", recipe, tmp_path / "out", "--json")
        assert (result.code, result.err) == (0, "")
        assert set(result.data) == {
            "path", "sha256", "merged", "copied", "per_task", "resumed_tensors", "notes",
        }  # fmt: skip
        assert result.data["path"] == str(tmp_path / "out")
        assert (result.data["merged"], result.data["copied"], result.data["resumed_tensors"]) == (19, 2, 0)
        assert result.data["per_task"] == ["a", "b"]
        record = json.loads((tmp_path / "out" / "plait.json").read_text())
        assert result.data["sha256"] == record["outputs"]
        assert set(result.data["sha256"]) == {"model.safetensors"}

    def test_text(self, call: Call, recipe: Path, tmp_path: Path) -> None:
        result = call("merge", recipe, tmp_path / "out")
        flat = " ".join(result.out.split())
        assert "out: 21 tensors, " in flat
        assert "from 2 models by ties" in flat
        assert "heads kept per task: a, b" in flat

    def test_without_a_recipe_file(self, call: Call, recipe: Path, models: Path, tmp_path: Path) -> None:
        written = {
            "merge_method": "dare_ties",
            "base_model": str(models / "base"),
            "models": [{"model": str(models / "expert-b"), "name": "second"}, {"model": str(models / "expert-a")}],
            "parameters": {"density": 0.5, "normalize": True, "rescale_by": "l1"},
            "out_dtype": "bfloat16",
            "seed": 7,
        }
        want = plait.merge(written, tmp_path / "want")
        spelt = [
            "merge", "--method", "dare_ties", "--base", models / "base", "--expert", models / "expert-a",
            "-e", f"second={models / 'expert-b'}", "--set", "density=0.5", "-s", "normalize=true",
            "-s", "rescale_by=l1", "--dtype", "bfloat16", "--seed", "7", "--json",
        ]  # fmt: skip
        result = call(*spelt, tmp_path / "out")
        assert result.data["sha256"] == want.hashes
        record = json.loads((tmp_path / "out" / "plait.json").read_text())
        assert [m["name"] for m in record["recipe"]["models"]] == ["expert-a", "second"]
        assert (tmp_path / "out" / "plait.json").read_bytes() == (tmp_path / "want" / "plait.json").read_bytes()
        other = call(*spelt[:-3], "--seed", "8", "--json", tmp_path / "other")
        assert other.data["sha256"] != want.hashes

    def test_relative_paths_and_names_with_an_equals_sign(
        self, call: Call, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "x=1").symlink_to(models / "expert-a")
        (tmp_path / "b").symlink_to(models / "expert-b")
        monkeypatch.chdir(tmp_path)
        result = call("merge", "-m", "linear", "-e", "x=1", "-e", "b=./b", "out", "--json", "-s", "weight=0.5")
        assert result.code == 0, result.err
        record = json.loads(Path("out/plait.json").read_text())
        assert [(m["model"], m["name"]) for m in record["recipe"]["models"]] == [("./b", "b"), ("x=1", "x_1")]

    def test_threads_memory_and_shards(self, call: Call, recipe: Path, tmp_path: Path) -> None:
        one = call("merge", recipe, tmp_path / "one", "--json", "--threads", 1, "--memory", "20MB")
        two = call("merge", recipe, tmp_path / "two", "--json", "--threads", 2)
        assert one.data["sha256"] == two.data["sha256"]
        many = call("merge", recipe, tmp_path / "many", "--json", "--shard-size", "10KB")
        assert len(many.data["sha256"]) > 2
        assert call("merge", recipe, tmp_path / "zero", "--threads", 0).code == 2

    def test_overwrite(self, call: Call, recipe: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        refused = call("merge", recipe, tmp_path / "out")
        assert refused.code == 2
        assert "--overwrite" in refused.err
        assert call("merge", recipe, tmp_path / "out", "--overwrite").code == 0
        assert (tmp_path / "out" / "model.safetensors").exists()

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["merge", "{recipe}"], "give RECIPE and OUT"),
            (["merge", "{recipe}", "out", "--base", "x"], "give RECIPE and OUT"),
            (["merge", "{recipe}", "out", "-s", "density=1"], "give RECIPE and OUT"),
            pytest.param(["merge", "{recipe}", "out", "--seed", "5"], "give RECIPE and OUT"),
            (["merge", "{recipe}", "out", "-m", "ties"], "give only the output folder"),
            (["merge", "-m", "ties", "out"], "name the models with --expert"),
            (["merge", "-m", "ties", "-e", "x", "-s", "density", "out"], "must be name=value"),
            (["merge", "{recipe}", "out", "--shard-size", "big"], "shard_size"),
            (["check"], "Missing argument"),
            (["plan", "{recipe}", "--jsn"], "No such option"),
        ],
    )
    def test_calls_that_cannot_be_meant(
        self, words: list[str], message: str, call: Call, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        result = call(*[word.format(recipe=recipe) for word in words])
        assert result.code == 2
        assert message in result.err
        assert not (tmp_path / "out").exists()

    def test_the_path_is_printed_as_it_is(self, call: Call, recipe: Path, tmp_path: Path) -> None:
        assert "out[draft]" in "".join(call("merge", recipe, tmp_path / "out[draft]").out.split())


class TestProgress:
    @pytest.fixture
    def chatty(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(progress, "_EVERY_SECONDS", 0.0)

    LINE = r"(survey \d|merge|inspect): (\d+)%, [\d.]+ [KM]?B of [\d.]+ [KM]B, [\d.]+ [KMG]?B/s, [\d.]+ s left"

    @pytest.mark.usefixtures("chatty")
    def test_lines_where_there_is_no_terminal(self, call: Call, models: Path, tmp_path: Path) -> None:
        spelt = ["-m", "ties", "--base", models / "base", "-e", models / "expert-a", "-e", models / "expert-b"]
        trim = ["-s", "density=0.3", "-s", "trim=model", "--threads", "1"]
        lines = call("merge", *spelt, *trim, tmp_path / "out").err.splitlines()
        found = [re.fullmatch(self.LINE, line) for line in lines]
        assert all(found), lines
        shares = {}
        for match in found:
            assert match is not None
            shares.setdefault(match[1], []).append(int(match[2]))
        assert "survey 1" in shares
        assert "merge" in shares
        for values in shares.values():
            assert values == sorted(values)
            assert values[-1] == 100

    @pytest.mark.usefixtures("chatty")
    @pytest.mark.parametrize("words", [["--quiet"], ["-q"], ["--json"]])
    def test_silence(self, words: list[str], call: Call, models: Path, tmp_path: Path) -> None:
        spelt = ["-m", "linear", "-e", models / "expert-a", "-e", models / "expert-b"]
        assert call("merge", *spelt, *words, tmp_path / "out").err == ""

    @pytest.mark.usefixtures("chatty")
    def test_inspect_tells_too(self, call: Call, models: Path) -> None:
        lines = call("inspect", models / "expert-a", "--base", models / "base", "--threads", 1).err.splitlines()
        assert lines
        assert all(re.fullmatch(self.LINE, line) for line in lines)
        assert lines[-1].startswith("inspect: 100%")

    def test_quick_merges_say_nothing(self, call: Call, recipe: Path, tmp_path: Path) -> None:
        assert call("merge", recipe, tmp_path / "out").err == ""


class TestInspect:
    def test_json(self, call: Call, models: Path, recipe: Path) -> None:
        data = call(
            "inspect", models / "expert-a", f"z={models / 'expert-b'}", "--base", models / "base", "--json"
        ).data
        assert set(data) == {"tasks", "overall", "groups", "tensors"}
        assert data["tasks"] == ["expert-a", "z"]
        for part in [data["overall"], *data["groups"].values(), *data["tensors"].values()]:
            assert set(part) == {
                "parameters", "base_norm", "norm", "relative_norm", "cosine", "sign_agreement", "unanimous", "changed",
            }  # fmt: skip
        assert len(data["tensors"]) == 21
        assert data["overall"]["parameters"] == sum(part["parameters"] for part in data["tensors"].values())
        by_recipe = call("inspect", recipe, "--json").data
        assert len(by_recipe["tensors"]) == 19
        name = "model.layers.0.mlp.up_proj.weight"
        assert list(by_recipe["tensors"][name]["norm"].values()) == list(data["tensors"][name]["norm"].values())

    def test_text(self, call: Call, models: Path) -> None:
        words = ["inspect", models / "expert-a", models / "expert-b", "--base", models / "base"]
        data = call(*words, "--json").data
        text, every = call(*words).out, call(*words, "--tensors").out
        overall = data["overall"]
        assert f"{overall['cosine'][0][1]:+.3f}" in text
        assert f"{overall['norm']['expert-a']:.4g}" in text
        assert f"{overall['parameters']:,} parameters, {overall['changed']:.1%} changed by some expert" in text
        assert "model.layers.*.mlp.up_proj" in text
        assert "model.layers.1.mlp.up_proj.weight" not in text
        assert "model.layers.1.mlp.up_proj.weight" in every

    def test_without_a_base(self, call: Call, models: Path) -> None:
        result = call("inspect", models / "expert-a", models / "expert-b")
        assert result.code == 2
        assert "base" in result.err


class TestMethods:
    def test_json(self, call: Call) -> None:
        data = {method["name"]: method for method in call("methods", "--json").data}
        assert list(data) == sorted(all_methods())
        assert data["della"]["scope"] == "row"
        (slerp,) = call("methods", "slerp", "--json").data
        assert slerp == data["slerp"]
        assert set(slerp) == {"name", "summary", "paper", "base", "experts", "scope", "parameters", "fit", "route"}
        assert (slerp["base"], slerp["experts"]) == ("required", [1, 1])
        assert slerp["parameters"] == {
            "t": {"type": "number in [0, 1]", "default": None, "required": True, "per_model": False}
        }
        assert data["linear"]["parameters"]["weight"]["per_model"] is True

    def test_text(self, call: Call) -> None:
        flat = " ".join(call("methods").out.split())
        for method in all_methods().values():
            assert method.name in flat
            assert method.paper in flat

    @pytest.mark.parametrize("name", all_methods())
    def test_one_in_full(self, name: str, call: Call) -> None:
        text = call("methods", name).out
        method = all_methods()[name]
        flat = " ".join(text.split())
        assert method.summary in flat
        for parameter in method.parameters.values():
            (row,) = [line for line in text.splitlines() if line.split()[:1] == [parameter.name]]
            assert parameter.describe() in row
            assert ("required" if parameter.required else str(parameter.default)) in row


HEAVY = "import sys; heavy = {'torch', 'numpy', 'transformers', 'safetensors'} & set(sys.modules)"


@pytest.mark.parametrize("words", [["--help"], ["merge", "--help"], ["inspect", "--help"], ["merge"], ["--nonsense"]])
def test_help_and_usage_errors_load_nothing_heavy(words: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["plait", *{words!r}]
from plait.cli import main
try:
    main()
except SystemExit:
    pass
{HEAVY}
assert not heavy, heavy
"""
    run = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "Usage" in run.stdout + run.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["check", "recipe.yaml"],
        ["check", "wrong.yaml"],
        ["plan", "recipe.yaml"],
        ["methods"],
        ["methods", "wudi"],
        ["init", "della"],
    ],
)
def test_what_reads_headers_and_schemas_alone_loads_no_torch(words: list[str], recipe: Path) -> None:
    """They start in a third of a second (docs/LOG.md): importing torch alone takes a whole one."""
    (recipe.parent / "wrong.yaml").write_text(recipe.read_text().replace("density", "densty"))
    code = f"""
import sys
sys.argv = ["plait", *{words!r}]
from plait.cli import main
try:
    main()
except SystemExit as stop:
    assert stop.code == 2 and "wrong.yaml" in sys.argv, stop
{HEAVY}
assert not heavy, heavy
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=recipe.parent, text=True, capture_output=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout or "did you mean 'density'" in run.stderr


def test_a_plan_of_a_large_model_is_made_from_headers_alone(call: Call, tmp_path: Path) -> None:
    """Llama 8B and two experts: 48 GB of sparse files, which take no space; bench/headers.py makes larger ones too."""
    script = Path(__file__).parent.parent / "bench" / "headers.py"
    made = [sys.executable, script, tmp_path / "llama", "--size", "8B", "--experts", "2", "--method", "linear"]
    subprocess.run(made, check=True, capture_output=True, timeout=60)
    plan = call("plan", tmp_path / "llama" / "recipe.yaml", "--json").data
    assert (plan["merged"], plan["copied"]) == (291, 0)
    assert plan["bytes_out"] == 2 * 8_030_261_248
    assert plan["bytes_in"] == 2 * plan["bytes_out"], "linear reads no base"
    assert plan["seconds_estimate"] > 10


def test_help_names_every_verb(call: Call) -> None:
    result = call("--help")
    assert result.code == 0
    for verb in ("init", "check", "plan", "merge", "inspect", "methods", "verify", "clean"):
        assert re.search(rf"\b{verb}\b", result.out)
        assert call(verb, "--help").code == 0


def test_the_installed_command(recipe: Path, tmp_path: Path) -> None:
    plait_command = Path(sys.executable).with_name("plait")
    if not plait_command.exists():
        pytest.skip("plait is not installed as a command here")
    run = subprocess.run(
        [plait_command, "merge", recipe, tmp_path / "out"], text=True, capture_output=True, timeout=120
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "21 tensors" in run.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_interrupted_merges_say_how_to_go_on(tmp_path: Path) -> None:
    for k, name in enumerate(("base", "a", "b")):
        (tmp_path / name).mkdir()
        noise = torch.Generator().manual_seed(k)
        tensors = {f"layers.{i}.weight": torch.randn(1000, 1000, generator=noise) for i in range(12)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    words = ["merge", "-m", "della", "-s", "density=0.5", "--base", "base", "-e", "a", "-e", "b", "--threads", "1"]

    def listen() -> None:  # a shell that runs this in the background makes its children deaf to it
        signal.signal(signal.SIGINT, signal.default_int_handler)

    run = subprocess.Popen(
        [sys.executable, "-m", "plait", *words, "out"],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=listen,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and run.poll() is None:
        if any(len(j.read_text().splitlines()) > 1 for j in tmp_path.glob(".out.partial-*/.journal")):
            break
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert not (tmp_path / "out").exists()
    assert "run the same command again" in errors
    assert run.returncode == 130
    assert "Traceback" not in errors
