"""Hub ids: what is downloaded, what an offline cache gives, and what each failure says. No network is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import hostile
import pytest

from plait.errors import CheckpointError
from plait.sources import open_source
from plait.sources.hub import files_to_download, looks_like_hub_id


def test_hub_ids() -> None:
    good = ["openai/clip-vit-base-patch32", "a/b@main", "a/b@refs/pr/3", "a/b.c_d@" + "0" * 40]
    bad = ["gpt2", "./a/b", "/a/b", "../b", "a/b/c", "a/..", "~/x", "a/b@", "a b/c", "a/b@x y", "a/b\n"]
    assert all(looks_like_hub_id(text) for text in good)
    assert not any(looks_like_hub_id(text) for text in bad)


def test_hub_files_to_download() -> None:
    side = ["config.json", "tokenizer.model", "README.md", "modeling_evil.py", "original/consolidated.safetensors"]
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    pickled = ["pytorch_model.bin", "training_args.bin"]
    both = [*side, *shards, "model.safetensors.index.json", *pickled]
    kept = ["config.json", *shards, "model.safetensors.index.json", "tokenizer.model"]
    assert files_to_download(both, "o/n") == sorted(kept)
    assert files_to_download([*side, *pickled], "o/n") == ["config.json", "pytorch_model.bin", "tokenizer.model"]
    adapter = ["adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"]
    assert files_to_download(adapter, "o/n") == ["adapter_config.json", "adapter_model.safetensors"]
    with pytest.raises(CheckpointError, match="GGUF"):
        files_to_download(["model.gguf"], "o/n")


def test_hub_cache_offline(tmp_path: Path) -> None:
    """A cache as huggingface_hub lays it out, links included, read in a process without network."""
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "blobs").mkdir()
    hostile.write_shard(repository / "blobs", "b" * 64, "w")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs") / ("b" * 64))
    (snapshot / "config.json").write_text('{"model_type": "x"}')
    script = (
        "import json, sys; from pathlib import Path; from plait.sources import open_source\n"
        "from plait.errors import CheckpointError\n"
        "out = []\n"
        "for spec in ('owner/name', 'owner/name@main', 'owner/name@' + 'a' * 40, 'owner/nane', 'owner/name@v2'):\n"
        "    try:\n"
        "        source = open_source(spec, cache_dir=Path(sys.argv[1]))\n"
        "        out.append([list(source.specs), source.config, source.label, source.read('w', 0, 1).tolist()])\n"
        "    except CheckpointError as error: out.append(str(error))\n"
        "print(json.dumps(out))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    *good, unknown, revision = json.loads(done.stdout)
    assert [found[:2] for found in good] == [[["w"], {"model_type": "x"}]] * 3
    assert all(words in unknown for words in ("owner/nane: HF_HUB_OFFLINE is set", "'hf download owner/nane'"))
    assert all(words in revision for words in ("owner/name@v2: HF_HUB_OFFLINE is set", "--revision v2"))


class _Hub:
    """Stands for the hub: raises what it is told to."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def list_repo_files(self, *_: object, **__: object) -> list[str]:
        raise self.error


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("GatedRepoError", "is gated on the hub.*hf auth login"),
        ("RepositoryNotFoundError", "not on the hub under this id"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("ConnectionError", "cannot be reached .*and the cache does not hold it"),
    ],
)
def test_hub_errors(kind: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants, errors

    error = getattr(errors, kind, ConnectionError)
    raised = error.__new__(error)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: _Hub(raised))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("none")))
    with pytest.raises(CheckpointError, match=words):
        open_source("owner/name@v9", cache_dir=tmp_path)
