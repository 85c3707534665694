"""Damaged and malicious checkpoints. Each builder writes one into a folder and returns what to open, and the file at
fault: opening it must raise `CheckpointError` naming that file, and must not run code, hang, or crash.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Builder = Callable[[Path], tuple[Path, str]]
BUILDERS: dict[str, Builder] = {}
MARKER = "code-was-executed"
"""A malicious pickle writes this file beside itself."""


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    """A safetensors file around any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    """A header entry; the shape is right for F32 unless given."""
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def builder(function: Callable[[Path], Path | str | None]) -> Builder:
    """Register; a path or a name that is returned is the file at fault, and the folder is what to open."""

    def build(folder: Path) -> tuple[Path, str]:
        fault = function(folder)
        return folder, Path(fault).name if fault else folder.name

    BUILDERS[function.__name__] = build
    return build


def _single(name: str, content: bytes) -> None:
    def build(folder: Path) -> str:
        (folder / "model.safetensors").write_bytes(content)
        return "model.safetensors"

    build.__name__ = name
    builder(build)


_DATA = bytes(16)
for _name, _content in {
    "empty_file": b"",
    "seven_bytes": b"\0" * 7,
    "git_lfs_pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345678901234\n",
    "html_page": b"<!DOCTYPE html><html><body>404</body></html>" * 10,
    "header_length_huge": struct.pack("<Q", 2**63) + b"{}",
    "header_over_limit": struct.pack("<Q", 100_000_001) + b"{}",
    "header_longer_than_file": struct.pack("<Q", 5000) + b'{"a":1}',
    "header_length_zero": struct.pack("<Q", 0),
    "header_not_json": safetensors_bytes(b"{not json}"),
    "header_not_utf8": safetensors_bytes(b'{"\xff\xfe": 1}'),
    "header_a_list": safetensors_bytes(b"[1, 2]"),
    "header_deeply_nested": safetensors_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "header_huge_integer": safetensors_bytes(b'{"a":' + b"9" * 10_000 + b"}"),
    "duplicate_tensor": safetensors_bytes(b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 16)).encode(),) * 2), _DATA),
    "duplicate_field": safetensors_bytes(
        b'{"a":{"dtype":"F32","dtype":"I32","shape":[4],"data_offsets":[0,16]}}', _DATA
    ),
    "entry_not_an_object": safetensors_bytes({"a": 3}),
    "entry_incomplete": safetensors_bytes({"a": {"dtype": "F32", "shape": [4]}}, _DATA),
    "dtype_unknown": safetensors_bytes({"a": entry(0, 16, dtype="F12")}, _DATA),
    "dtype_not_text": safetensors_bytes({"a": entry(0, 16, dtype=["F32"])}, _DATA),
    "dtype_float8": safetensors_bytes({"a": entry(0, 16, [16], "F8_E4M3")}, _DATA),
    "shape_negative": safetensors_bytes({"a": entry(0, 16, [-2, -2])}, _DATA),
    "shape_fractional": safetensors_bytes({"a": entry(0, 16, [4.0])}, _DATA),
    "shape_boolean": safetensors_bytes({"a": entry(0, 4, [True])}, _DATA[:4]),
    "shape_not_a_list": safetensors_bytes({"a": entry(0, 16, "4")}, _DATA),
    "shape_overflows": safetensors_bytes({"a": entry(0, 16, [2**62, 2**62])}, _DATA),
    "shape_beyond_64_bits": safetensors_bytes({"a": entry(0, 0, [0, 2**70])}),
    "offsets_do_not_match_shape": safetensors_bytes({"a": entry(0, 16, [5])}, _DATA),
    "offsets_reversed": safetensors_bytes({"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, _DATA),
    "offsets_negative": safetensors_bytes({"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}, _DATA),
    "offsets_of_three": safetensors_bytes({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}, _DATA),
    "tensors_overlap": safetensors_bytes({"a": entry(0, 16), "b": entry(8, 24)}, bytes(24)),
    "tensors_alias": safetensors_bytes({"a": entry(0, 16), "b": entry(0, 16)}, _DATA),
    "hole_between_tensors": safetensors_bytes({"a": entry(0, 16), "b": entry(20, 24)}, bytes(24)),
    "hole_at_the_start": safetensors_bytes({"a": entry(4, 16)}, _DATA),
    "truncated_data": safetensors_bytes({"a": entry(0, 16)}, _DATA[:9]),
    "bytes_after_the_data": safetensors_bytes({"a": entry(0, 16)}, bytes(20)),
    "metadata_not_text": safetensors_bytes({"__metadata__": {"format": 1}, "a": entry(0, 16)}, _DATA),
    "metadata_not_a_table": safetensors_bytes({"__metadata__": "pt", "a": entry(0, 16)}, _DATA),
    "name_with_escape_codes": safetensors_bytes({"\x1b[2Ja": entry(0, 16)}, _DATA),
    "name_empty": safetensors_bytes({"": entry(0, 16)}, _DATA),
    "name_half_a_surrogate": safetensors_bytes(b'{"\\ud800":%s}' % json.dumps(entry(0, 16)).encode(), _DATA),
}.items():
    _single(_name, _content)


def write_index(folder: Path, weight_map: object, name: str = "model.safetensors.index.json") -> str:
    """An index file with the given map."""
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return name


def write_shard(folder: Path, name: str, *tensors: str) -> None:
    """A small valid safetensors file holding the tensors named."""
    header = {tensor: entry(4 * at, 4 * at + 4) for at, tensor in enumerate(tensors)}
    (folder / name).write_bytes(safetensors_bytes(header, bytes(4 * len(tensors))))


def _index_to(name: str, target: str) -> None:
    def build(folder: Path) -> str:
        write_shard(folder.parent, "outside.safetensors", "a")
        return write_index(folder, {"a": target.replace("FOLDER", str(folder.parent))})

    build.__name__ = name
    builder(build)


_index_to("index_leaves_the_folder", "../outside.safetensors")
_index_to("index_absolute_path", "FOLDER/outside.safetensors")
_index_to("index_windows_path", "..\\outside.safetensors")
_index_to("index_drive", "C:outside.safetensors")
_index_to("index_dots", "..")
_index_to("index_nul", "a\0.safetensors")


@builder
def index_without_map(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text("{}")
    return "model.safetensors.index.json"


@builder
def index_map_a_list(folder: Path) -> str:
    return write_index(folder, ["a"])


@builder
def index_value_a_number(folder: Path) -> str:
    return write_index(folder, {"a": 3})


@builder
def index_not_json(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text("<html>")
    return "model.safetensors.index.json"


@builder
def shard_missing(folder: Path) -> str:
    write_shard(folder, "one.safetensors", "a")
    write_index(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    return "two.safetensors"


@builder
def shard_lacks_tensor(folder: Path) -> str:
    write_shard(folder, "one.safetensors", "a")
    write_index(folder, {"a": "one.safetensors", "b": "one.safetensors"})
    return "one.safetensors"


@builder
def tensor_in_two_shards(folder: Path) -> str:
    write_shard(folder, "one.safetensors", "a", "b")
    write_shard(folder, "two.safetensors", "b")
    write_index(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    return "two.safetensors"


@builder
def shard_is_a_folder(folder: Path) -> str:
    (folder / "one.safetensors").mkdir()
    write_index(folder, {"a": "one.safetensors"})
    return "one.safetensors"


@builder
def weights_are_a_pipe(folder: Path) -> str:
    os.mkfifo(folder / "model.safetensors")
    return "model.safetensors"


@builder
def weights_are_a_dead_link(folder: Path) -> str:
    (folder / "model.safetensors").symlink_to(folder / "gone")
    return "model.safetensors"


@builder
def weights_link_to_themselves(folder: Path) -> str:
    (folder / "model.safetensors").symlink_to(folder / "model.safetensors")
    return "model.safetensors"


@builder
def several_files_without_index(folder: Path) -> None:
    write_shard(folder, "model-00001-of-00002.safetensors", "a")
    write_shard(folder, "model-00002-of-00002.safetensors", "b")


@builder
def folder_without_weights(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


@builder
def config_not_an_object(folder: Path) -> str:
    write_shard(folder, "model.safetensors", "a")
    (folder / "config.json").write_text("[]")
    return "config.json"


@builder
def config_huge(folder: Path) -> str:
    write_shard(folder, "model.safetensors", "a")
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse: reading it would fill the memory
    return "config.json"


class _Payload:
    """Unpickles to a call that touches the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


@builder
def pickle_that_runs_code(folder: Path) -> str:
    import torch

    torch.save({"a": torch.zeros(2), "b": _Payload(folder / MARKER)}, folder / "pytorch_model.bin")
    return "pytorch_model.bin"


@builder
def legacy_pickle_that_runs_code(folder: Path) -> str:
    import torch

    content = {"a": torch.zeros(2), "b": _Payload(folder / MARKER)}
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return "pytorch_model.bin"


@builder
def bare_pickle_that_runs_code(folder: Path) -> str:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Payload(folder / MARKER)))
    return "pytorch_model.bin"


@builder
def adapter_pickle_that_runs_code(folder: Path) -> str:
    import torch

    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')
    torch.save({"x.lora_A.weight": _Payload(folder / MARKER)}, folder / "adapter_model.bin")
    return "adapter_model.bin"


def _torch_file(name: str, make: Callable[[Any], Any]) -> None:
    def build(folder: Path) -> str:
        import torch

        torch.save(make(torch), folder / "pytorch_model.bin")
        return "pytorch_model.bin"

    build.__name__ = name
    builder(build)


_torch_file("state_dict_a_tensor", lambda torch: torch.zeros(3))
_torch_file("state_dict_a_list", lambda torch: [torch.zeros(3)])
_torch_file("state_dict_without_tensors", lambda torch: {"epoch": 3, "state_dict": {"loss": 0.5}})
_torch_file("state_dict_with_a_number", lambda torch: {"a": torch.zeros(3), "epoch": 3})
_torch_file("state_dict_numbered_keys", lambda torch: {0: torch.zeros(3)})
_torch_file("tensor_expanded", lambda torch: {"a": torch.zeros(1).expand(1 << 50)})
_torch_file("tensor_float8", lambda torch: {"a": torch.zeros(4).to(torch.float8_e4m3fn)})
_torch_file("tensor_complex", lambda torch: {"a": torch.zeros(4, dtype=torch.complex64)})
_torch_file("tensor_sparse", lambda torch: {"a": torch.eye(3).to_sparse()})
_torch_file("tensor_on_meta", lambda torch: {"a": torch.zeros(3, device="meta")})


def _torch_bytes(name: str, change: Callable[[bytes], bytes]) -> None:
    def build(folder: Path) -> str:
        import torch

        whole = io.BytesIO()
        torch.save({"a": torch.arange(5000.0)}, whole)
        (folder / "pytorch_model.bin").write_bytes(change(whole.getvalue()))
        return "pytorch_model.bin"

    build.__name__ = name
    builder(build)


_torch_bytes("torch_file_empty", lambda whole: b"")
_torch_bytes("torch_file_truncated", lambda whole: whole[: len(whole) // 2])
_torch_bytes("torch_file_beginning_lost", lambda whole: whole[len(whole) // 2 :])
_torch_bytes("torch_file_text", lambda whole: b"<!DOCTYPE html>" * 100)


@builder
def torch_file_compressed(folder: Path) -> str:
    import torch

    whole = io.BytesIO()
    torch.save({"a": torch.zeros(1_000_000)}, whole)
    with (
        zipfile.ZipFile(whole) as source,
        zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return "pytorch_model.bin"


@builder
def zip_without_pickle(folder: Path) -> str:
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as target:
        target.writestr("archive/data/0", bytes(100))
    return "pytorch_model.bin"


def write_adapter(folder: Path, tensors: dict[str, list[int]], **config: Any) -> None:
    """A LoRA adapter of zeros with the given keys and shapes (F32)."""
    header, position = {}, 0
    for name, shape in tensors.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = entry(position, position + size, shape)
        position += size
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(header, bytes(position)))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}))


LORA = {"base_model.model.q.lora_A.weight": [2, 3], "base_model.model.q.lora_B.weight": [5, 2]}
"""A valid adapter of rank 2 on a [5, 3] weight."""


def _adapter(
    name: str, fault: str = "adapter_config.json", extra: dict[str, list[int]] | None = None, **config: Any
) -> None:
    def build(folder: Path) -> str:
        write_adapter(folder, {**LORA, **(extra or {})}, **config)
        return fault

    build.__name__ = "adapter_" + name
    builder(build)


for _key, _value in {
    "peft_type": "IA3", "use_dora": True, "lora_bias": True, "trainable_token_indices": [1], "r": 0, "lora_alpha": "16",
    "target_parameters": ["experts.up"], "layer_replication": [[0, 2]], "use_qalora": True, "use_rslora": "yes",
    "alora_invocation_tokens": [1], "some_future_key": {"x": 1}, "modules_to_save": "head", "rank_pattern": [1],
    "alpha_pattern": {"q": None}, "bias": "some",
}.items():  # fmt: skip
    _adapter(f"with_{_key}", **{_key: _value})
for _init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "something_new"):
    _adapter(f"initialised_by_{_init}", init_lora_weights=_init)
_adapter("rank_contradicts", r=4)
_adapter("pattern_nested_quantifier", rank_pattern={"(a+)+b": 2})
_adapter("pattern_alternation_repeated", rank_pattern={"(a|a)*b": 2})
_adapter("pattern_many_quantifiers", rank_pattern={".*.*.*.*.*b": 2})
_adapter("pattern_back_reference", rank_pattern={r"(a)\1": 2})
_adapter("pattern_lookahead", rank_pattern={"(?=a)": 2})
_adapter("pattern_too_long", rank_pattern={"a" * 201: 2})
_adapter("pattern_not_a_regex", rank_pattern={"[a": 2})
_WEIGHTS = "adapter_model.safetensors"
_adapter("dora_vector", _WEIGHTS, {"base_model.model.q.lora_magnitude_vector": [5]})
_adapter("lora_bias_tensor", _WEIGHTS, {"base_model.model.q.lora_B.bias": [5]})
_adapter("key_of_another_tuner", _WEIGHTS, {"base_model.model.q.ia3_l": [5]})
_adapter("key_not_declared", _WEIGHTS, {"base_model.model.norm.weight": [5]})
_adapter("token_delta", _WEIGHTS, {"base_model.model.embed_tokens.token_adapter.trainable_tokens_delta": [1, 5]})
_adapter("half_a_pair", _WEIGHTS, {"base_model.model.k.lora_A.weight": [2, 3]})
_adapter("two_adapters", _WEIGHTS, {"base_model.model.q.lora_A.other.weight": [2, 3]})
_adapter("mixed_kinds", _WEIGHTS, {"m.lora_embedding_A": [2, 3], "m.lora_B.weight": [5, 2]})
_adapter("wrapped_twice", _WEIGHTS, {"m.base_layer.lora_A.weight": [2, 3], "m.base_layer.lora_B.weight": [5, 2]})
_adapter("ranks_differ", _WEIGHTS, {"k.lora_A.weight": [2, 3], "k.lora_B.weight": [5, 3]})
_adapter("grouped_convolution", _WEIGHTS, {"c.lora_A.weight": [2, 3, 1, 1], "c.lora_B.weight": [4, 1, 1, 1]})
_adapter("rank_zero", _WEIGHTS, {"k.lora_A.weight": [0, 3], "k.lora_B.weight": [5, 0]})


@builder
def adapter_without_weights(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


@builder
def adapter_empty(folder: Path) -> str:
    write_adapter(folder, {})
    return _WEIGHTS
