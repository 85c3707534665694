"""Recipes, suites, states and results from strangers: what a user is told to run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hostile.checkpoints import entry, safetensors_bytes, write_index, write_shard
from hostile.corpus import HARMLESS, MERGE, World, add, case, change_json
from plait.shards import small_file

CHECK, PLAN = "check {here}/recipe.yaml", "plan {here}/recipe.yaml"
RUN = "merge --quiet {here}/recipe.yaml {out}"
HEAD = "merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n  - model: {expert}\n"


def recipe(name: str, text: str, fault: str = "recipe.yaml", words: str = CHECK) -> None:
    """A recipe; `BASE` and `EXPERT` are replaced by good ones."""

    def build(folder: Path, world: World) -> str:
        whole = text.replace("BASE", str(world.base)).replace("EXPERT", str(world.expert))
        (folder / "recipe.yaml").write_bytes(whole.encode("utf-8", "surrogatepass"))
        return fault

    add("recipe_" + name, "recipe", words, build)


GOOD = "merge_method: task_arithmetic\nbase_model: BASE\nmodels: [{model: EXPERT}]\n"
BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
recipe("alias_bomb", BOMB)
recipe("alias_of_itself", "models: &a [*a]\n")
recipe("merge_keys_bomb", "a: &a {b: c}\n" + "".join(f"d{i}: {{<<: *a}}\n" for i in range(20_000)))
recipe("deep", "[" * 100_000)
recipe("deep_but_closed", "models: " + "[" * 300 + "]" * 300)
recipe("wide", "models:\n" + "- x\n" * 200_000)
recipe("tag_runs_code", "models: !!python/object/apply:os.system ['touch code-was-executed']\n")
recipe("tag_makes_object", "models: !!python/object:plait.recipe.Recipe {}\n")
recipe("tag_imports_module", "models: !!python/module:os\n")
recipe("tag_binary", GOOD + "parameters: {weight: !!binary aGVsbG8=}\n")
recipe("tag_timestamp_that_is_none", GOOD + "parameters: {weight: !!timestamp x}\n")
recipe("date_that_is_none", GOOD + "parameters: {weight: 2024-13-45}\n")
recipe("integer_of_thousands", GOOD + "parameters: {weight: 1" + "0" * 4000 + "}\n")
recipe("integer_of_many_thousands", GOOD + "seed: " + "9" * 6000 + "\n")
recipe("number_is_infinite", GOOD + "parameters: {weight: .inf}\n")
recipe("null_byte", GOOD + "dtype: 'a\0'\n")
recipe("not_utf8", "\udcff\udcfe: 1\n")
recipe("two_documents", GOOD + "---\n" + GOOD)
recipe("key_twice", GOOD + "seed: 1\nseed: 2\n")
recipe("key_a_list", GOOD + "? [a, b]\n: 1\n")
recipe("directive", "%YAML 9.9\n---\na: 1\n")
recipe("escape_codes", GOOD + '"\\e[2J\\a": 1\n')
recipe("turned_text", GOOD + '"\\u202Egnp": 1\n')
recipe("half_a_surrogate", GOOD + '"\\ud800": 1\n')
recipe("name_climbs", GOOD.replace("{model", "{name: ../../escaped, model"), words=RUN, fault="../../escaped")
recipe("name_absolute", GOOD.replace("{model", "{name: /tmp/escaped, model"), words=RUN, fault="/tmp/escaped")
recipe("name_of_escape_codes", GOOD.replace("{model", '{name: "\\e]0;x\\a", model'), words=RUN, fault="name:")
recipe("model_of_null_byte", GOOD.replace("EXPERT", '"a\\0b"'), fault="a\\x00b")
recipe("model_is_the_root", GOOD.replace("EXPERT", "/"), fault="/: holds no weights")
recipe("model_is_a_device", GOOD.replace("EXPERT", "/dev/zero"), fault="/dev/zero")
recipe("model_climbs_to_a_secret", GOOD.replace("EXPERT", "../../../../../../../../etc/passwd"), fault="passwd")
recipe("tokenizer_from_elsewhere", GOOD + "tokenizer_source: /etc\n", fault="tokenizer_source")
recipe(
    "layers_without_end",
    "merge_method: passthrough\nslices: [{sources: [{model: BASE, layer_range: [0, 999999999999]}]}]\n",
)
recipe("layers_negative", "merge_method: passthrough\nslices: [{sources: [{model: BASE, layer_range: [-5, 3]}]}]\n")
recipe("gradient_of_null", GOOD.replace("task_arithmetic", "slerp") + "parameters: {t: [null, 0.5]}\n")
recipe("stages_not_a_list", GOOD.replace("task_arithmetic", "wemoe") + "shared: {transforms: 3, combine: sum}\n")
recipe("seed_beyond_64_bits", GOOD + f"seed: {2**70}\n")
recipe("code_as_method", GOOD.replace("task_arithmetic", "os.system"), fault="os.system")
recipe("state_elsewhere",
       GOOD.replace("task_arithmetic", "wemoe") + "shared: {merge_method: adamerging, state: /etc}\n",
       words=RUN)  # fmt: skip
recipe("state_given_elsewhere", GOOD.replace("task_arithmetic", "adamerging"),
       words=RUN.replace("merge", "merge --state /etc"),
       fault="/etc")  # fmt: skip


@case("recipe", "check /dev/zero")
def recipe_is_a_device(folder: Path, world: World) -> str:
    return "/dev/zero"


@case("recipe", CHECK)
def recipe_is_a_folder(folder: Path, world: World) -> str:
    (folder / "recipe.yaml").mkdir()
    return "recipe.yaml"


@case("index", MERGE)
def index_links_out_of_the_folder(folder: Path, world: World) -> str:
    write_shard(folder.parent, "secret.safetensors", "a")
    (folder / "one.safetensors").symlink_to(folder.parent / "secret.safetensors")
    write_index(folder, {"a": "one.safetensors"})
    return "one.safetensors"


@case("index", MERGE)
def index_of_torch_links_out_of_the_folder(folder: Path, world: World) -> str:
    torch.save({"a": torch.zeros(1)}, folder.parent / "secret.bin")
    (folder / "one.bin").symlink_to(folder.parent / "secret.bin")
    write_index(folder, {"a": "one.bin"}, "pytorch_model.bin.index.json")
    return "one.bin"


@case("index", MERGE)
def index_larger_than_memory(folder: Path, world: World) -> str:
    with (folder / "model.safetensors.index.json").open("wb") as file:
        file.truncate(1 << 40)
    return "model.safetensors.index.json"


@case("adapter", MERGE)
def adapter_of_absurd_rank(folder: Path, world: World) -> str:
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    header = {f"{name}.lora_A.weight": entry(0, 0, [1 << 40, 0]), f"{name}.lora_B.weight": entry(0, 0, [0, 1 << 40])}
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(header))
    change_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 1 << 40, "lora_alpha": 1})
    return "adapter_model.safetensors"


@case("adapter", MERGE)
def adapter_of_endless_alpha(folder: Path, world: World) -> str:
    change_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 1, "lora_alpha": 10**400})
    write_shard(folder, "adapter_model.safetensors", "a")
    return "adapter_config.json"


@case("names", MERGE, HARMLESS)
def tensor_names_that_climb(folder: Path, world: World) -> str:
    """What only an expert has goes into heads/, under the expert's name: a tensor's name is never a path."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(world.expert / "model.safetensors")
    tensors |= {"../../escaped": torch.zeros(2), "/tmp/escaped": torch.zeros(2), "[/red] <script>": torch.zeros(2)}
    save_file(tensors, folder / "model.safetensors")
    return ""


@case("names", "plan --tensors {here}/recipe.yaml", HARMLESS)
def tensor_names_of_markup(folder: Path, world: World) -> str:
    tensor_names_that_climb(folder, world)
    (folder / "recipe.yaml").write_text(json.dumps({
        "merge_method": "task_arithmetic", "base_model": str(world.base), "models": [{"model": str(folder)}],
    }))  # fmt: skip
    return ""


@case("names", "inspect --quiet --tensors --base {here}/base {here}/expert", HARMLESS)
def merged_tensor_names_of_markup(folder: Path, world: World) -> str:
    for name in ("base", "expert"):
        (folder / name).mkdir()
        write_shard(folder / name, "model.safetensors", "[/] [bold", "[link=http://x]a[/link]")
    return ""


@case("names", "merge --quiet --method linear --expert {here} {out}", HARMLESS)
def side_files_that_link_out(folder: Path, world: World) -> str:
    """A stranger's folder must not make the merge copy this machine's files, nor code, into the output."""
    write_shard(folder, "model.safetensors", "a")
    (folder.parent / "secret.json").write_text('{"code-was-executed": 1}')
    (folder / "stolen.json").symlink_to(folder.parent / "secret.json")
    (folder / "modeling_evil.py").write_text("open('code-was-executed', 'w')")
    change_json(folder / "config.json", {"auto_map": {"AutoModel": "modeling_evil.Evil"}, "model_type": "evil"})
    return ""


FACTS: dict[str, Any] = {
    "schema": "plait.state/1", "method": "adamerging", "paper": "x", "sees": "x", "tasks": ["a"], "models": {},
    "seed": 0, "split": "adapt", "vectors": {}, "fit": {"granularity": "task", "init": 0.3}, "data": {}, "summary": {},
}  # fmt: skip


def state(name: str, facts: dict[str, Any] | bytes, numbers: bytes | None = None, fault: str = "state.json") -> None:
    def build(folder: Path, world: World) -> str:
        text = facts if isinstance(facts, bytes) else json.dumps({**FACTS, **facts}).encode()
        (folder / "state.json").write_bytes(text)
        plain = small_file({"coefficients/all": torch.zeros(1)})
        (folder / "state.safetensors").write_bytes(plain if numbers is None else numbers)
        return fault

    add("state_" + name, "state", "inspect {here}", build)


state("not_json", b"<html>")
state("deep", b'{"schema": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
state("of_another_schema", {"schema": "plait.state/9\x1b[2J"})
state("without_facts", b'{"schema": "plait.state/1"}')
state("tasks_a_number", {"tasks": 3})
state("fit_of_lists", {"fit": {"granularity": ["task"]}})
state("summary_a_list", {"summary": [1]})
state("judged_by_texts", {"summary": {"tasks": {"a": {"agreement": "x"}}}})
state("temperature_zero", {"fit": {"concrete": 0.0}})
state("numbers_lie", {}, safetensors_bytes({"a": entry(0, 1 << 40)}), "state.safetensors")
state("numbers_missing_scale", {}, small_file({"mask/w": torch.zeros(3, dtype=torch.int8)}), "mask_scale/w")
state("numbers_a_pickle", {}, b"\x80\x04cos\nsystem\n", "state.safetensors")


def results(name: str, text: str | bytes, fault: str = "results.json") -> None:
    def build(folder: Path, world: World) -> str:
        (folder / "results.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        return fault

    add("results_" + name, "results", "report {here}/results.json --out {out}", build)


EVALUATION = json.loads((Path(__file__).parents[1] / "fuzz" / "seeds.json").read_text())["results"][0]
results("not_json", "<html>")
results("deep", '{"schema": ' + "[" * 100_000 + "]" * 100_000 + "}")
results("a_list", "[]")
results("of_no_schema", "{}")
results("integer_of_thousands", '{"schema": ' + "9" * 6000 + "}")
results("not_utf8", b"\xff\xfe{")
results("shape_lies", json.dumps({**EVALUATION, "routing": {**EVALUATION["routing"], "routes": ["r"] * 9}}))
results("unknown_key", json.dumps({**EVALUATION, "\x1b[2J": 1}))
results("interval_a_text", json.dumps({**EVALUATION, "average": "<script>"}))


@case("results", "report {here}/results.json --out {out}")
def results_larger_than_memory(folder: Path, world: World) -> str:
    with (folder / "results.json").open("wb") as file:
        file.truncate(1 << 40)
    return "results.json"


@case("results", "report /dev/zero --out {out}")
def results_are_a_device(folder: Path, world: World) -> str:
    return "/dev/zero"


@case("results", "report {here}/results.json --out {out}", HARMLESS)
def results_with_html_in_names(folder: Path, world: World) -> str:
    evil = "<script>alert(1)</script>[/red]"
    task = EVALUATION["tasks"]["a"]
    found = {**EVALUATION, "tasks": {evil: task}, "suite": {"name": evil, "tasks": [evil], "fingerprint": evil},
             "model": {**EVALUATION["model"], "label": evil}, "versions": {evil: evil}, "routing": None}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(found))
    return ""
