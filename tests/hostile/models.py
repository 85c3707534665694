"""What evaluation reads: configs, tokenizers, heads, routed models, suites and their data. All as data, not code."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from hostile.checkpoints import MARKER, _Payload, entry, safetensors_bytes
from hostile.corpus import HARMLESS, World, add, case, change_json

EVAL = "eval {here} --suite {suite} --task tone --no-cache --quiet"
SHOW = "suite show {here}/suite.yaml"


def config(name: str, fault: str, outcome: str = "refused", **changes: Any) -> None:
    """The suite's base with changes to its config.json."""

    def build(folder: Path, world: World) -> str:
        world.bert(folder, **changes)
        (folder / "evil.py").write_text(f"open({str(folder / MARKER)!r}, 'w')\nclass Evil: pass\n")
        return fault

    add("config_" + name, "config", EVAL, build, outcome)


config("auto_map_of_a_known_kind", "", HARMLESS, auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"})
config(
    "auto_map_of_its_own_kind",
    "evil",
    model_type="evil",
    auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"},
)
config("auto_map_on_the_hub", "evil", model_type="evil", auto_map={"AutoModel": "stranger/repo--evil.Evil"})
config("attention_from_the_hub", "attn_implementation", attn_implementation="stranger/kernels:evil")
config("layers_without_end", "num_hidden_layers", num_hidden_layers=10**9)
config("layers_negative", "num_hidden_layers", num_hidden_layers=-3)
config("width_beyond_memory", "config.json", hidden_size=1 << 20, intermediate_size=1 << 22)
config("vocabulary_beyond_memory", "config.json", vocab_size=1 << 33)
config("positions_beyond_memory", "config.json", max_position_embeddings=1 << 34)
config("labels_beyond_memory", "num_labels", num_labels=10**9)
config("width_a_text", "here", hidden_size="32")
config("width_zero", "here", hidden_size=0, num_attention_heads=0)
config("activation_unknown", "here", hidden_act="__import__('os').system('x')")
config("heads_that_do_not_divide", "here", num_attention_heads=7)
config("quantised", "here", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
config("kind_a_list", "here", model_type=["bert"])


def bert(name: str, kind: str, fault: str, change: Callable[[Path, World], object], outcome: str = "refused") -> None:
    """The suite's base with any change to its folder."""

    def build(folder: Path, world: World) -> str:
        world.bert(folder)
        change(folder, world)
        return fault

    add(name, kind, EVAL, build, outcome)


def _config_text(text: bytes) -> Callable[[Path, World], object]:
    return lambda folder, world: (folder / "config.json").write_bytes(text)


def _truncate(name: str, size: int) -> Callable[[Path, World], object]:
    return lambda folder, world: os.truncate(folder / name, size)


bert("config_deep", "config", "config.json", _config_text(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"))
bert("config_key_twice", "config", "config.json", _config_text(b'{"model_type": "bert", "model_type": "evil"}'))
bert("config_larger_than_memory", "config", "config.json", _truncate("config.json", 1 << 40))
bert("weights_lack_layers", "config", "here", lambda f, w: change_json(f / "config.json", {"num_hidden_layers": 9}))


def tokenizer(
    name: str, text: bytes, file: str = "tokenizer.json", outcome: str = "refused", fault: str = "base"
) -> None:
    """The suite's base, the folder itself, with one tokenizer file replaced: the suite's base gives the tokenizer."""

    def build(folder: Path, world: World) -> str:
        target = world.suite.copy(folder)
        (folder / "base" / file).write_bytes(text)
        (folder / "base" / "evil.py").write_text(f"open({str(folder / MARKER)!r}, 'w')\nclass Evil: pass\n")
        assert target.exists()
        return fault

    add("tokenizer_" + name, "tokenizer", "eval {here}/base --suite {here}/suite.yaml --task tone --no-cache --quiet",
        build, outcome)  # fmt: skip


tokenizer("empty", b"")
tokenizer("not_json", b"<html>")
tokenizer("deep", b"[" * 100_000 + b"]" * 100_000)
tokenizer("a_list", b"[]")
tokenizer("of_wrong_types", b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": 3}}')
tokenizer("a_pickle", pickle.dumps({"a": 1}))
tokenizer("code_of_its_own", json.dumps({
    "pad_token": "<pad>", "tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
}).encode(), "tokenizer_config.json", HARMLESS)  # fmt: skip
tokenizer("class_unknown", b'{"pad_token": "<pad>", "tokenizer_class": "os.system"}', "tokenizer_config.json", HARMLESS)
tokenizer("without_padding", b"{}", "tokenizer_config.json", fault="tokenizer")


@case("tokenizer", "merge --quiet {here}/recipe.yaml {out}")
def tokenizer_union_of_nonsense(folder: Path, world: World) -> str:
    import shutil

    shutil.copytree(world.expert, folder / "expert")
    (folder / "expert" / "tokenizer.json").write_bytes(b'{"model": {"vocab": [[[["x"]]]]}}')
    (folder / "recipe.yaml").write_text(json.dumps({
        "merge_method": "task_arithmetic", "base_model": str(world.base), "models": [{"model": str(folder / "expert")}],
        "tokenizer_source": "union",
    }))  # fmt: skip
    return "tokenizer.json"


def head(name: str, content: bytes | dict[str, torch.Tensor], fault: str = "tone.safetensors") -> None:
    """A model that brings a head of its own."""

    def write(folder: Path, world: World) -> None:
        (folder / "heads").mkdir()
        path = folder / "heads" / "tone.safetensors"
        path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)

    bert("head_" + name, "head", fault, write)


head("a_pickle", pickle.dumps(_Payload(Path(MARKER))))
head("header_lies", safetensors_bytes({"weight": entry(0, 1 << 40, [1 << 38])}))
head("no_head", {"x": torch.zeros(3)})
head("of_another_width", {"weight": torch.zeros(3, 7)})
head("of_another_count", {"weight": torch.zeros(9, 32)})
head("a_vector", {"weight": torch.zeros(32)})
head("of_five_axes", {"weight": torch.zeros(1, 1, 1, 3, 32)})
head("bias_of_another_size", {"weight": torch.zeros(3, 32), "bias": torch.zeros(5)})
head("half_a_correction", {"weight": torch.zeros(3, 32), "surgery.down": torch.zeros(4, 32)})
head("not_numbers", {"weight": torch.full((3, 32), float("nan"))})

STORE = {"store": "dense", "shape": [64, 32], "precision": "float32"}
LAYER = "encoder.layer.0.intermediate.dense"


def routed(
    name: str, fault: str = "config.json", tensors: dict[str, torch.Tensor] | None = None,
    plainly: dict[str, Any] | None = None, **changes: Any,
) -> None:  # fmt: skip
    """A routed model over the suite's base whose description lies; `plainly` goes into config.json itself."""
    if tensors is None and "layers" not in changes:  # then the lie is elsewhere, and the experts are as described
        tensors = {f"{LAYER}.experts.weight.values": torch.zeros(2, 2048)}

    def write(folder: Path, world: World) -> None:
        plain = json.loads((folder / "config.json").read_text())
        layout = {"format": 1, "method": "wemoe", "model_type": "bert", "architecture": "BertModel",
                  "tasks": ["a", "b"], "router": {"kind": "task"}, "groups": [],
                  "layers": {LAYER: {"weight": STORE}}, **changes}  # fmt: skip
        routed_config = {**plain, "model_type": "plait_routed", "architectures": ["RoutedModel"], "plait": layout,
                         **(plainly or {})}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(routed_config))
        os.rename(folder / "model.safetensors", folder / "routed.safetensors")
        if tensors is not None:
            from safetensors.torch import load_file

            save_file({**load_file(folder / "routed.safetensors"), **tensors}, folder / "routed.safetensors")

    bert("routed_" + name, "routed", fault, write)


routed("sizes_absurd", layers={LAYER: {"weight": {**STORE, "shape": [1 << 50, 1 << 50]}}})
routed("sizes_infinite", layers={LAYER: {"weight": {**STORE, "shape": [float("inf")]}}})
routed("sizes_not_stored", "routed.safetensors", {})
routed("ranks_absurd", layers={LAYER: {"weight": {**STORE, "store": "low_rank", "ranks": [1 << 62, 1]}}})
routed("layer_climbs", "routed.safetensors", layers={"../../escaped": {"weight": STORE}})
routed("layer_of_python", "routed.safetensors", layers={"__class__": {"weight": STORE}})
routed("layer_not_there", "x.y", {"x.y.experts.weight.values": torch.zeros(2, 2048)}, layers={"x.y": {"weight": STORE}})
routed("layer_of_python_stored", "__class__", {"__class__.experts.weight.values": torch.zeros(2, 2048)},
       layers={"__class__": {"weight": STORE}})  # fmt: skip
routed("shape_of_another", LAYER, {f"{LAYER}.experts.weight.values": torch.zeros(2, 6)},
       layers={LAYER: {"weight": {**STORE, "shape": [2, 3]}}})  # fmt: skip
routed("architecture_of_python", "__import__", architecture="__import__")
routed("architecture_not_a_model", "AutoTokenizer", architecture="AutoTokenizer")
routed("kind_of_another", "evil", model_type="evil")
routed("tasks_none", tasks=[])
routed("tasks_a_number", tasks=3)
routed("router_a_list", router=[1])
routed("router_unknown", router={"kind": "exec"})
routed("router_depth_absurd", "here", router={"kind": "layers", "depth": 10**9}, groups=[[LAYER]])
routed("router_width_absurd", "here", router={"kind": "features", "width": 1 << 50})
routed("format_of_the_future", "here", format="9\x1b[2J")
routed("layers_without_end", "num_hidden_layers", plainly={"num_hidden_layers": 10**9})
routed("width_beyond_memory", "config.json", plainly={"hidden_size": 1 << 20})
bert("routed_deep", "routed", "config.json", _config_text(b'{"model_type": "plait_routed", "plait": ' + b"[" * 99_999))


def suite(
    name: str, fault: str, change: Callable[[dict[str, Any]], object], words: str = SHOW, outcome: str = "refused"
) -> None:
    """The good suite with changes to its YAML."""

    def build(folder: Path, world: World) -> str:
        path = world.suite.copy(folder)
        data = yaml.safe_load(path.read_text())
        change(data)
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return fault

    add("suite_" + name, "suite", words, build, outcome)


def _rename(data: dict[str, Any], name: str) -> None:
    data["tasks"] = {name: data["tasks"]["tone"]}


def _data(**entry: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data.update(tasks={"tone": {**data["tasks"]["tone"], "data": {"test": entry}}})


TONE = "eval {here}/base --suite {here}/suite.yaml --task tone --no-cache --quiet"
suite("task_climbs", "../../escaped", lambda data: _rename(data, "../../escaped"))
suite("task_of_html", "<script>", lambda data: _rename(data, "<script>alert(1)</script>"))
suite("task_of_escape_codes", "suite.yaml", lambda data: _rename(data, "\x1b[2J"))
suite("base_climbs", "passwd", lambda data: data.update(base="../../../../../../../../../etc/passwd"))
suite("head_climbs", "passwd", lambda data: data["tasks"]["tone"].update(head="/etc/passwd"), TONE)
suite("expert_a_device", "/dev/zero", lambda data: data["tasks"]["tone"].update(expert="/dev/zero"), TONE)
suite("data_a_device", "/dev/zero", _data(path="/dev/zero"))
suite("data_passwd", "passwd", _data(path="/etc/passwd"))
suite(
    "prompt_digs",
    "prompt",
    lambda data: data["tasks"]["tone"].update(prompt="{text.__class__.__mro__}"),
    outcome=HARMLESS,
)
suite("name_climbs", "", lambda data: data.update(name="../../escaped [/red]"), outcome=HARMLESS)
suite("data_of_a_script", "evil", _data(dataset="evil", split="train"))


def data(name: str, file: str, content: bytes, words: str = SHOW, fault: str | None = None) -> None:
    """A data file of the suite."""

    def build(folder: Path, world: World) -> str:
        path = world.suite.copy(folder)
        (folder / file).write_bytes(content)
        found = yaml.safe_load(path.read_text())
        found["tasks"] = {"tone": {**found["tasks"]["tone"], "data": {"test": file}}}
        path.write_text(yaml.safe_dump(found, sort_keys=False))
        return file if fault is None else fault

    add("data_" + name, "data", words, build)


data("csv_of_nul", "d.csv", b"text,label\n\0\0\0,1\n" + b"\0" * 100_000, TONE)
data("csv_of_one_giant_field", "d.csv", b'text,label\n"' + b"a" * 2_000_000, TONE)
data("csv_not_utf8", "d.csv", b"text,label\n\xff\xfe,0\n")
data("csv_ragged", "d.csv", b"text,label\na,0\nb,0,1,2\n")
data("csv_labels_absurd", "d.csv", b"text,label\na,99999999999\n", TONE)
data("json_deep", "d.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n")
data("json_of_lists", "d.jsonl", b'{"text": ["a"], "label": 0}\n{"text": 3, "label": 0}\n')
data("json_not_json", "d.jsonl", b"<html>\n")
data("parquet_not_parquet", "d.parquet", b"PAR1" + b"\xff" * 1000 + b"PAR1")
data("parquet_footer_lies", "d.parquet", b"PAR1" + b"\0" * 100 + struct.pack("<i", 2**31 - 1) + b"PAR1")
data("parquet_empty", "d.parquet", b"")
data("pickle", "d.pkl", pickle.dumps(_Payload(Path(MARKER))))
