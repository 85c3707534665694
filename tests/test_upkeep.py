"""`plait verify` finds every changed byte and says where; `plait clean` finds what is ours, and nothing else."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from calls import Call
from conftest import folder_hash
from safetensors import safe_open

import plait
from plait import atomic, leftovers


@pytest.fixture(scope="module")
def made(llama: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Outputs to be damaged: one file, several, and a routed one. Their recipe names folders relative to `root`."""
    root = tmp_path_factory.mktemp("made")
    for name, folder in llama.items():
        (root / name).symlink_to(folder)
    recipe = {"base_model": "base", "models": [{"model": name} for name in ("one", "two")]}
    (root / "recipe.json").write_text(json.dumps({**recipe, "merge_method": "task_arithmetic"}))
    (root / "routed.json").write_text(json.dumps({**recipe, "merge_method": "emr"}))
    plait.merge(root / "recipe.json", root / "single")
    plait.merge(root / "recipe.json", root / "shards", shard_size="60KB")
    plait.merge(root / "routed.json", root / "routed")
    return {name: root / name for name in ("single", "shards", "routed")} | {"root": root}


def flip(path: Path, at: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        (old,) = file.read(1)
        file.seek(at)
        file.write(bytes([old ^ 1 << bit]))


class TestVerify:
    @pytest.mark.parametrize("name", ["single", "shards", "routed"])
    def test_what_is_whole(self, name: str, call: Call, made: dict[str, Path]) -> None:
        result = call("verify", made[name], "--json")
        assert result.code == 0
        files = {path.relative_to(made[name]).as_posix() for path in made[name].rglob("*") if path.is_file()}
        assert set(result.data["checked"]) == files - {"README.md"}
        assert result.data["ok"]
        assert result.data["unrecorded"] == []
        text = call("verify", made[name])
        assert (text.code, text.err) == (0, "")
        assert "are what was written" in text.out

    @pytest.mark.parametrize("name", ["single", "shards", "routed"])
    def test_any_bit_of_any_file(self, name: str, call: Call, made: dict[str, Path], tmp_path: Path) -> None:
        out = tmp_path / "out"
        shutil.copytree(made[name], out)
        chance = random.Random(name)
        for path in sorted(path for path in out.rglob("*") if path.is_file() and path.name != "README.md"):
            for at in {0, path.stat().st_size - 1, *(chance.randrange(path.stat().st_size) for _ in range(2))}:
                content = path.read_bytes()
                flip(path, at, chance.randrange(8))
                result = call("verify", out)
                assert result.code == 3, f"byte {at} of {path.name}"
                assert str(path) in result.err
                assert "Traceback" not in result.err
                path.write_bytes(content)
        assert call("verify", out).code == 0

    @pytest.mark.parametrize("name", ["single", "shards", "routed"])
    def test_the_tensor_is_named(self, name: str, call: Call, made: dict[str, Path], tmp_path: Path) -> None:
        out = tmp_path / "out"
        shutil.copytree(made[name], out)
        for path in sorted(out.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                names = [key for key in file.offset_keys() if 0 not in file.get_slice(key).get_shape()]
            header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
            start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
            for tensor in (names[0], names[-1], names[len(names) // 2]):
                begin, end = header[tensor]["data_offsets"]
                for at in {start + begin, start + end - 1}:
                    flip(path, at)
                    result = call("verify", out, "--json")
                    assert result.code == 3
                    assert list(result.data["damage"]) == [path.name]
                    assert result.data["damage"][path.name].endswith(f"lies in tensor '{tensor}'")
                    flip(path, at)
            flip(path, start - 12)
            assert "header" in call("verify", out, "--json").data["damage"][path.name]
            flip(path, start - 12)

    def test_missing_cut_and_foreign_files(self, call: Call, made: dict[str, Path], tmp_path: Path) -> None:
        out = tmp_path / "out"
        shutil.copytree(made["single"], out)
        (out / "tokenizer.json").unlink()
        os.truncate(out / "model.safetensors", 5000)
        (out / "more.txt").write_text("mine")
        (out / "README.md").write_text("my own words")
        result = call("verify", out, "--json")
        assert result.code == 3
        assert result.data["damage"] == {
            "tokenizer.json": "is missing",
            "model.safetensors": "is not what was written: its header cannot be read, or the file was cut",
        }
        assert result.data["unrecorded"] == ["more.txt"]
        assert f"{out / 'tokenizer.json'}: is missing" in result.err
        assert "merge again" in result.err

    @pytest.mark.parametrize(
        ("record", "told"),
        [
            (None, "holds no plait.json"),
            ("{", "not valid JSON"),
            ({}, "has no outputs"),
            ({"outputs": {"../x": "0"}}, "do not trust it"),
            ({"outputs": {"/etc/hostname": "0"}}, "do not trust it"),
            ({"outputs": {"a\0b": "0"}}, "do not trust it"),
            ({"outputs": {"x": 5}, "files": [1]}, "files is no mapping"),
            ({"outputs": {"x": 5}, "marks": {"x": 7}}, "x: is missing"),
        ],
    )
    def test_records_that_are_none(self, record: Any, told: str, call: Call, tmp_path: Path) -> None:
        if record is not None:
            (tmp_path / "plait.json").write_text(record if isinstance(record, str) else json.dumps(record))
        result = call("verify", tmp_path)
        assert result.code == 3
        assert told in result.err

    @pytest.mark.parametrize("name", ["single", "shards", "routed"])
    def test_replay(self, name: str, call: Call, made: dict[str, Path]) -> None:
        before = sorted(made["root"].iterdir())
        result = call("verify", made[name], "--replay", "--root", made["root"], "--threads", "2")
        assert (result.code, result.err) == (0, "")
        assert "merging again gives the same bytes" in result.out
        assert sorted(made["root"].iterdir()) == before

    def test_replay_sees_a_record_that_tells_a_tale(self, call: Call, made: dict[str, Path], tmp_path: Path) -> None:
        """Every digest fits, but the weights are not what the recipe makes."""
        from plait.digests import sealed

        out = tmp_path / "out"
        shutil.copytree(made["single"], out)
        record = json.loads((out / "plait.json").read_text())
        record.pop("seal")
        record["recipe"]["parameters"] = {"weight": 0.7}
        (out / "plait.json").write_bytes(sealed(record))
        assert call("verify", out).code == 0
        result = call("verify", out, "--replay", "--root", made["root"])
        assert result.code == 3
        assert "model.safetensors: came out otherwise when it was merged again" in result.err

    def test_replay_wants_the_same_inputs(self, call: Call, made: dict[str, Path], tmp_path: Path) -> None:
        for name in ("base", "one", "two"):
            shutil.copytree(made["root"] / name, tmp_path / name)
        with open(tmp_path / "two" / "model.safetensors", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x07")
        result = call("verify", made["single"], "--replay", "--root", tmp_path)
        assert result.code == 3
        assert "two: is not what was merged" in result.err
        assert call("verify", made["single"], "--replay", "--root", tmp_path / "base").code == 3
        assert call("verify", made["single"], "--root", tmp_path).code == 2

    def test_a_learned_model_and_its_state(self, mini: Any, call: Call, tmp_path: Path) -> None:
        models = [{"model": str(mini.expert(task)), "name": task} for task in ("tone", "count")]
        asked = {"merge_method": "adamerging", "base_model": str(mini.base), "models": models,
                 "data": str(mini.root / "suite.yaml"), "fit": {"steps": 2, "batch": 4, "guard": False}}  # fmt: skip
        out = plait.merge(asked, tmp_path / "out").path
        assert call("verify", out, "--replay").code == 0
        assert call("verify", out / "state").code == 0
        flip(out / "state" / "state.safetensors", 300)
        for folder in (out, out / "state"):
            result = call("verify", folder, "--json")
            assert (result.code, len(result.data["damage"])) == (3, 1)


NAMES = {
    "unfinished merge": ".out.partial-0123456789abcdef",
    "unfinished fit": ".state.fitting-0123456789abcdef",
    "has fitted": ".out.state-0123456789abcdef",
    "plait verify": ".out.replay-ab_cd123",
    "being saved": ".out.writing-99999999",
}


class TestClean:
    def leave(self, folder: Path) -> list[Path]:
        folder.mkdir(exist_ok=True)
        for name in NAMES.values():
            (folder / name).mkdir()
            (folder / name / "model.safetensors").write_bytes(bytes(5000))
        (folder / ".comparison.json-99999999").write_text("{}")
        return sorted(path for path in folder.iterdir() if path.name.startswith("."))

    def test_listed_then_removed(self, call: Call, tmp_path: Path) -> None:
        left = self.leave(tmp_path / "work") + self.leave(tmp_path / "work" / "below")
        listed = call("clean", tmp_path / "work", "--json").data
        assert sorted(item["path"] for item in listed["leftovers"]) == sorted(map(str, left))
        assert all(item["bytes"] >= 2 and item["age_seconds"] < 600 for item in listed["leftovers"])
        assert listed["removed"] == 0
        text = call("clean", tmp_path / "work").out
        for what in NAMES:
            assert what in text
        assert "plait clean --remove" in text
        assert call("clean", tmp_path / "work", "--remove", "--json").data["removed"] == len(left)
        assert [path.name for path in (tmp_path / "work").rglob("*")] == ["below"]
        assert "nothing is left" in call("clean", tmp_path / "work").out

    def test_what_a_process_works_on_stays(self, call: Call, tmp_path: Path) -> None:
        held = tmp_path / NAMES["unfinished merge"]
        self.leave(tmp_path)
        own = tmp_path / f".out.writing-{os.getpid()}"
        own.mkdir()
        code = "import fcntl, os, sys; f = os.open(sys.argv[1], 0); fcntl.flock(f, fcntl.LOCK_EX); print(); input()"
        with subprocess.Popen(
            [sys.executable, "-c", code, str(held)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            result = call("clean", tmp_path, "--remove").out
            assert f"{held}: an unfinished merge" in result
            assert "kept: a process is working on it" in result
            assert f"process {os.getpid()} is running" in result
            assert sorted(path.name for path in tmp_path.iterdir()) == sorted([held.name, own.name])
            holder.kill()
        call("clean", tmp_path, "--remove")
        assert list(tmp_path.iterdir()) == [own]

    def test_one_that_is_taken_up_meanwhile_stays(self, tmp_path: Path) -> None:
        self.leave(tmp_path)
        found = leftovers.find(tmp_path)
        guard = os.open(tmp_path / NAMES["unfinished fit"], os.O_RDONLY)
        fcntl.flock(guard, fcntl.LOCK_EX)
        gone = leftovers.remove(found)
        os.close(guard)
        assert len(gone) == len(found) - 1
        assert [path.name for path in tmp_path.iterdir()] == [NAMES["unfinished fit"]]

    def test_nothing_of_others(self, call: Call, llama: dict[str, Path], tmp_path: Path) -> None:
        for name in (
            ".git", ".partial-0123456789abcdef", ".out.partial-0123", ".out.partial-0123456789abcdeg", "-",
            "out.partial-0123456789abcdef", ".cache-99999999", ".x.state-zz", ".out.writing-",
        ):  # fmt: skip
            (tmp_path / "place" / name).mkdir(parents=True)
            (tmp_path / "place" / name / "file").write_text("precious")
        (tmp_path / "precious").mkdir()
        (tmp_path / "precious" / "file").write_text("precious")
        (tmp_path / "place" / ".out.partial-0123456789abcdef").symlink_to(tmp_path / "precious")
        (tmp_path / "place" / ".out.fitting-0123456789abcdef").write_text("a file and no folder")
        before = folder_hash(tmp_path)
        assert call("clean", tmp_path / "place", "--remove", "--json").data == {
            "leftovers": [], "bytes": 0, "removed": 0
        }  # fmt: skip
        assert folder_hash(tmp_path) == before
        assert call("clean", tmp_path / "nowhere").code == 2

    def test_the_only_copy_of_an_output_stays(self, call: Call, tmp_path: Path) -> None:
        aside = tmp_path / f".out.{atomic.REPLACED}"
        aside.mkdir()
        assert "only copy of the former output" in call("clean", tmp_path, "--remove").out
        assert aside.exists()
        (tmp_path / "out").mkdir()
        call("clean", tmp_path, "--remove")
        assert not aside.exists()

    def test_the_cache(self, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = tmp_path / "cache"
        half = [cache / "suites" / "vision" / ".base-99999999", cache / "evaluations" / "1" / ".ab.json-99999998"]
        half[0].mkdir(parents=True)
        half[1].parent.mkdir(parents=True)
        half[1].write_text("{")
        kept = cache / "suites" / "vision" / "base"
        kept.mkdir()
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        monkeypatch.setenv("PLAIT_CACHE", str(cache))
        assert call("clean", "--remove", "--json").data["removed"] == 2
        assert not any(path.exists() for path in half)
        assert kept.exists()

    def test_a_real_interruption(self, call: Call, llama: dict[str, Path], tmp_path: Path) -> None:
        """What a merge leaves that fails half way is found, and once it is done nothing is."""
        broken = tmp_path / "broken"
        shutil.copytree(llama["two"], broken)
        with open(broken / "model.safetensors", "r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\x00\x00\xc0\x7f")  # NaN
        words = ["merge", "-m", "linear", "-e", llama["one"], "-e", f"two={broken}", tmp_path / "out", "--threads", "1"]
        assert call(*words).code == 3
        (found,) = call("clean", tmp_path, "--json").data["leftovers"]
        assert found["what"] == "an unfinished merge"
        assert found["of"] == "out"
        words[6] = f"two={llama['two']}"
        result = call(*words)
        assert result.code == 0
        assert "plait clean removes it" in result.out
        assert call("clean", tmp_path, "--remove", "--json").data["removed"] == 1
        assert call("verify", tmp_path / "out").code == 0
