"""Reading checkpoints: every format gives the stored bytes back by any span and thread; bad files are sentences."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from plait.errors import CheckpointError, PlaitError
from plait.sources import AdapterSource, SafetensorsSource, Source, TorchSource, open_source, split_adapter_spec
from plait.sources.adapter_config import compile_pattern


def example_tensors() -> dict[str, torch.Tensor]:
    """Every supported type, with empty and 0-dimensional tensors."""
    torch.manual_seed(0)
    return {
        "half": torch.randn(7, 5).half(),
        "brain": torch.randn(3, 4, 5).bfloat16(),
        "single": torch.randn(33),
        "double": torch.randn(4, 4).double(),
        "counts": torch.randint(-9, 9, (6,)),
        "bytes": torch.arange(10, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 8),
        "name with é": torch.randn(2),
    }


def write_form(form: str, folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The same tensors as one of the formats."""
    names = list(tensors)
    halves = {1: names[::2], 2: names[1::2]}
    if form == "safetensors":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif form == "sharded safetensors":
        for number, part in halves.items():
            save_file({name: tensors[name] for name in part}, folder / f"model-0000{number}-of-00002.safetensors")
        hostile.write_index(
            folder, {n: f"model-0000{k}-of-00002.safetensors" for k, part in halves.items() for n in part}
        )
    elif form == "sharded torch":
        for number, part in halves.items():
            torch.save({name: tensors[name] for name in part}, folder / f"pytorch_model-0000{number}-of-00002.bin")
        where = {n: f"pytorch_model-0000{k}-of-00002.bin" for k, part in halves.items() for n in part}
        hostile.write_index(folder, where, "pytorch_model.bin.index.json")
    else:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form != "legacy torch")
    return folder


FORMS = ["safetensors", "sharded safetensors", "torch", "legacy torch", "sharded torch"]


@pytest.mark.parametrize("form", FORMS)
def test_round_trip(form: str, tmp_path: Path) -> None:
    tensors = example_tensors()
    source = open_source(str(write_form(form, tmp_path, tensors)))
    assert isinstance(source, Source)
    assert source.specs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert source.specs[name].shape == tuple(tensor.shape)
        read = source.read(name, 0, tensor.numel())
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor.reshape(-1))
    source.close()
    with pytest.raises(CheckpointError, match="closed"):
        source.read("single", 0, 1)


@pytest.mark.parametrize("form", ["safetensors", "torch"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_spans(form: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    tensors = example_tensors()
    if form == "torch":
        tensors["strided"] = torch.randn(6, 8, 4).permute(2, 0, 1)
        tensors["every other"] = torch.arange(20)[::2]
    source = open_source(str(write_form(form, tmp_path_factory.mktemp("span"), tensors)))
    name = data.draw(st.sampled_from(list(tensors)))
    count = tensors[name].numel()
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    assert torch.equal(source.read(name, start, stop), tensors[name].reshape(-1)[start:stop])
    with pytest.raises(PlaitError, match="outside"):
        source.read(name, start, count + 1)
    with pytest.raises(CheckpointError, match="did you mean"):
        source.read(name + "x", 0, 0)


def test_threads_read_the_same(tmp_path: Path) -> None:
    tensors = {f"t{index}": torch.randn(1000) for index in range(8)}
    source = open_source(str(write_form("sharded safetensors", tmp_path, tensors)))
    spans = [(name, at) for name in tensors for at in range(0, 1000, 50)] * 5
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda span: source.read(span[0], span[1], span[1] + 50), spans))
    assert all(torch.equal(part, tensors[name][at : at + 50]) for part, (name, at) in zip(read, spans, strict=True))


def test_transformers_shards(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    source = open_source(str(tmp_path))
    assert len(source.header_hashes()) > 2
    assert source.config["model_type"] == "llama"
    state = model.state_dict()
    assert source.specs.keys() == state.keys()
    assert all(torch.equal(source.read(name, 0, state[name].numel()), state[name].view(-1)) for name in state)


@pytest.mark.parametrize("name", hostile.BUILDERS)
def test_hostile(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    target, fault = hostile.BUILDERS[name](folder)
    with pytest.raises(CheckpointError) as caught:
        open_source(str(target))
    assert fault in str(caught.value)
    assert str(caught.value).endswith(".")
    assert not (folder / hostile.MARKER).exists()


def test_environment_cannot_allow_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    target, _ = hostile.BUILDERS["pickle_that_runs_code"](tmp_path)
    with pytest.raises(CheckpointError, match="could run code"):
        open_source(str(target))
    assert not (tmp_path / hostile.MARKER).exists()


def test_truncation_is_counted(tmp_path: Path) -> None:
    target, _ = hostile.BUILDERS["truncated_data"](tmp_path)
    with pytest.raises(CheckpointError, match=r"7 bytes are missing. Download it again"):
        open_source(str(target))


def test_shrinking_while_read(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(10_000)}, tmp_path / "model.safetensors")
    source = open_source(str(tmp_path))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(5_000)
    with pytest.raises(CheckpointError, match="too short while it was read"):
        source.read("a", 0, 10_000)


def test_replaced_while_open(tmp_path: Path) -> None:
    """The open file goes on being read; the stamp tells."""
    save_file({"a": torch.zeros(10)}, tmp_path / "model.safetensors")
    source = open_source(str(tmp_path))
    before = source.stamp()
    save_file({"a": torch.ones(10)}, tmp_path / "new")
    (tmp_path / "new").replace(tmp_path / "model.safetensors")
    assert source.read("a", 0, 10).sum() == 0
    assert source.stamp() != before


@pytest.mark.parametrize("form", FORMS)
def test_fingerprints(form: str, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "copy", "other")]
    for folder in folders:
        folder.mkdir()
    tensors = {"large": torch.zeros(300_000), "head": torch.zeros(5)}
    other = {**tensors, "head": torch.ones(5)}
    one, copy, third = (
        open_source(str(write_form(form, f, t))) for f, t in zip(folders, (tensors, tensors, other), strict=True)
    )
    assert one.fingerprint() == copy.fingerprint() != third.fingerprint()
    assert one.header_hashes() == copy.header_hashes()
    assert one.stamp() == one.stamp() != copy.stamp()


def test_unlisted_tensors_and_whole_file_first(tmp_path: Path) -> None:
    hostile.write_shard(tmp_path, "one.safetensors", "a", "stray")
    hostile.write_index(tmp_path, {"a": "one.safetensors"})
    assert list(open_source(str(tmp_path)).specs) == ["a"]
    hostile.write_shard(tmp_path, "model.safetensors", "whole")
    torch.save({"pickled": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert list(open_source(str(tmp_path)).specs) == ["whole"]


def test_head_is_not_the_model(tmp_path: Path) -> None:
    hostile.write_shard(tmp_path, "weights.safetensors", "a")
    hostile.write_shard(tmp_path, "head.safetensors", "head")
    torch.save({}, tmp_path / "optimizer.pt")
    source = open_source(str(tmp_path))
    assert isinstance(source, SafetensorsSource)
    assert list(source.specs) == ["a"]
    assert source.extra_heads == tmp_path / "head.safetensors"
    assert list(open_source(str(tmp_path / "head.safetensors")).specs) == ["head"]


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_nested_state_dict(key: str, tmp_path: Path) -> None:
    torch.save({"epoch": 3, key: {"a": torch.ones(2)}}, tmp_path / "checkpoint.pt")
    source = open_source(str(tmp_path / "checkpoint.pt"))
    assert isinstance(source, TorchSource)
    assert source.nested_under == key
    assert list(source.specs) == ["a"]


def test_missing_paths(tmp_path: Path) -> None:
    (tmp_path / "expert-math").mkdir()
    with pytest.raises(CheckpointError, match=r"no such file or folder \(did you mean '.*expert-math'"):
        open_source("./expert-mth", root=tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match="not a kind of file"):
        open_source("model.gguf", root=tmp_path)
    for spec in ("", "a\0b", "~nobody-of-this-name/x", "x" * 5000):
        with pytest.raises(CheckpointError):
            open_source(spec)


def test_relative_to_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, tensor in (("recipe", "of_recipe"), ("here", "of_here")):
        (tmp_path / place / "model").mkdir(parents=True)
        hostile.write_shard(tmp_path / place / "model", "model.safetensors", tensor)
    monkeypatch.chdir(tmp_path / "here")
    assert list(open_source("model", root=tmp_path / "recipe").specs) == ["of_recipe"]
    assert list(open_source("model").specs) == ["of_here"]
    assert list(open_source("model", root=tmp_path / "elsewhere").specs) == ["of_here"]


def test_split_adapter_spec(tmp_path: Path) -> None:
    for name in ("a+b", "base", "x+y/base"):
        (tmp_path / name).mkdir(parents=True)
    assert split_adapter_spec("plain") == ("plain", None)
    assert split_adapter_spec("a+b", tmp_path) == ("a+b", None)
    assert split_adapter_spec("base+a+b", tmp_path) == ("base", "a+b")
    assert split_adapter_spec("x+y/base+a+b", tmp_path) == ("x+y/base", "a+b")
    assert split_adapter_spec("o/base@main+o/lora@v1") == ("o/base@main", "o/lora@v1")


def test_opening_does_not_import_torch(tmp_path: Path) -> None:
    hostile.write_shard(tmp_path, "model.safetensors", "a")
    script = (
        "import sys; from plait.sources import open_source; source = open_source(sys.argv[1]); source.fingerprint()\n"
        "assert not {'torch', 'huggingface_hub', 'numpy'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, check=True)


def test_patterns_follow_peft() -> None:
    from peft.utils.other import get_pattern_key

    names = ["model.layers.1.q_proj", "model.layers.11.q_proj", "q_proj", "model.layers.1.xq_proj", "vq_proj.k"]
    patterns = ["q_proj", r".*\.1\.q_proj", "layers.1.q_proj", "^q_proj", r"layers\.[0-9]+\.q_proj", "1.*", "q_proj|k"]
    for pattern in patterns:
        rule = compile_pattern(pattern, "rank_pattern", Path("adapter_config.json"))
        for name in names:
            assert bool(rule.match(name)) == (get_pattern_key([pattern], name) == pattern), (pattern, name)


def test_close_releases_files(tmp_path: Path) -> None:
    hostile.write_adapter(tmp_path, hostile.LORA)
    before = len(list(Path("/proc/self/fd").iterdir()))
    source = open_source(str(tmp_path))
    assert isinstance(source, AdapterSource)
    source.close()
    source.close()
    open_source(str(tmp_path))  # dropped: closes itself
    for name in ("truncated_data", "tensor_in_two_shards"):
        (tmp_path / name).mkdir()
        with pytest.raises(CheckpointError):
            open_source(str(hostile.BUILDERS[name](tmp_path / name)[0]))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
