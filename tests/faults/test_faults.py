"""Disks that fill, files that fail, change or vanish, two merges at once: a sentence, an exit code, and no harm."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import Call
from conftest import folder_hash
from mini_suite import MiniSuite

import plait
from plait import atomic
from plait.errors import CheckpointError, MachineError, RecipeError
from plait.plan import make_plan
from plait.recipe import load_recipe
from plait.run import run
from plait.sources.safetensors import SafetensorsSource
from plait.stages import Silent
from plait.state import write_state


@pytest.fixture
def recipe(llama: dict[str, Path], tmp_path: Path) -> Path:
    """A merge whose inputs may be damaged: they are copies."""
    models = {name: shutil.copytree(folder, tmp_path / "in" / name) for name, folder in llama.items()}
    data = {
        "merge_method": "ties", "base_model": str(models["base"]), "parameters": {"density": 0.5},
        "models": [{"model": str(models[name]), "name": name} for name in ("one", "two")],
    }  # fmt: skip
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(data))
    return path


@pytest.fixture(scope="module")
def whole(llama: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Digest of the uninterrupted merge by a recipe."""
    known: dict[str, str] = {}

    def digest(recipe: Path) -> str:
        out = tmp_path_factory.mktemp("whole") / "out"
        plait.merge(recipe, out)
        return known.setdefault(str(recipe), folder_hash(out))

    return digest


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def at_call(number: int, then: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wrap a function: its `number`-th call is `then` instead, told the function and its arguments."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        lock, seen = threading.Lock(), [0]

        def wrapped(*given: Any, **named: Any) -> Any:
            with lock:
                seen[0] += 1
                due = seen[0] == number
            return then(function, *given, **named) if due else function(*given, **named)

        return wrapped

    return wrap


def failing(number: int, code: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def fail(function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return at_call(number, fail)


def meanwhile(number: int, act: Callable[[], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Something happens just before the `number`-th call."""

    def first(function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        act()
        return function(*given, **named)

    return at_call(number, first)


class TestFullDisk:
    @pytest.mark.parametrize(
        ("function", "number", "code"),
        [
            ("pwrite", 1, errno.ENOSPC), ("pwrite", 9, errno.EDQUOT), ("posix_fallocate", 1, errno.ENOSPC),
            ("fsync", 1, errno.EIO), ("fsync", 4, errno.ENOSPC), ("replace", 1, errno.ENOSPC),
            ("rename", 1, errno.EROFS),
        ],
    )  # fmt: skip
    def test_a_merge_says_so_and_goes_on(
        self, call: Call, recipe: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        function: str, number: int, code: int,
    ) -> None:  # fmt: skip
        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            patch.setattr(os, function, failing(number, code)(getattr(os, function)))
            result = call("merge", recipe, out)
        assert result.code == 1
        assert "run the same command" in result.err
        assert str(out) in result.err
        assert "Traceback" not in result.err
        assert not out.exists()
        assert call("merge", recipe, out).code == 0
        assert folder_hash(out) == whole(recipe)
        assert not hidden(tmp_path)

    def test_a_small_disk(self, call: Call, recipe: Path, whole: Any, tmp_path: Path) -> None:
        small = tmp_path / "small"
        small.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", small], capture_output=True)
        if mounted.returncode:
            pytest.skip("mounting a small file system is not permitted here")
        try:
            result = call("merge", recipe, small / "out")
            assert result.code == 1
            assert "the disk is too full" in result.err
            assert "free some space" in result.err
            assert list(small.iterdir()) == []
            subprocess.run(["mount", "-o", "remount,size=10m", small], check=True, capture_output=True)
            assert call("merge", recipe, small / "out").code == 0
            assert folder_hash(small / "out") == whole(recipe)
            free = shutil.disk_usage(small).free
            (small / "filler").write_bytes(bytes(free - 150_000))
            # Now the weights fit and what comes after them does not.
            result = call("merge", recipe, small / "more")
            assert result.code == 1
            assert "full" in result.err
            assert not (small / "more").exists()
        finally:
            subprocess.run(["umount", small], check=True)

    def test_a_limit_on_the_size_of_files(self, call: Call, recipe: Path, tmp_path: Path) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, before[1]))
        try:
            result = call("merge", recipe, tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert result.code == 1
        assert "File too large" in result.err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("function", ["replace"])
    def test_a_fit_says_so_and_goes_on(
        self, call: Call, mini: MiniSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
    ) -> None:
        path = learned(mini, tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(os, function, failing(1, errno.ENOSPC)(getattr(os, function)))
            result = call("fit", path, tmp_path / "state")
        assert result.code == 1
        assert "No space left" in result.err
        assert "--resume" in result.err
        assert not (tmp_path / "state").exists()
        assert call("fit", path, tmp_path / "state", "--resume").code == 0
        assert not hidden(tmp_path)


def learned(mini: MiniSuite, folder: Path) -> Path:
    models = [{"model": str(mini.expert(task)), "name": task} for task in ("tone", "count", "pair")]
    data = {
        "merge_method": "adamerging", "base_model": str(mini.base), "models": models,
        "data": str(mini.root / "suite.yaml"), "fit": {"steps": 2, "batch": 4, "guard": False},
    }  # fmt: skip
    path = folder / "learned.json"
    path.write_text(json.dumps(data))
    return path


class TestReading:
    @pytest.mark.parametrize(
        ("fault", "told"),
        [("error", r"cannot be read \(Input/output error\).*check the disk"), ("short", r"gave \d+ of \d+ numbers")],
    )
    def test_a_source_that_fails(
        self, call: Call, recipe: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        fault: str, told: str,
    ) -> None:  # fmt: skip
        def short(function: Any, source: Any, name: str, start: int, stop: int) -> Any:
            return function(source, name, start, stop - 1)

        wrap = failing(12, errno.EIO) if fault == "error" else at_call(12, short)
        with monkeypatch.context() as patch:
            patch.setattr(SafetensorsSource, "read", wrap(SafetensorsSource.read))
            result = call("merge", recipe, tmp_path / "out")
        assert result.code == 3
        assert re.search(told, result.err.replace("\n", " ")), result.err
        assert not (tmp_path / "out").exists()
        assert call("merge", recipe, tmp_path / "out").code == 0
        assert folder_hash(tmp_path / "out") == whole(recipe)

    @pytest.mark.parametrize(
        ("disk", "code", "told"),
        [
            ("in", 3, r"model.safetensors.*cannot be read \(Input/output error\)"),
            ("out", 1, r"model.*\.safetensors: cannot be read back \(Input/output error\).*disk of the output"),
        ],
    )
    def test_a_disk_that_fails_below(
        self, call: Call, recipe: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        disk: str, code: int, told: str,
    ) -> None:  # fmt: skip
        """Inputs are read while the output is read back for its hash: the file decides, for the order does not hold."""
        real, failed = os.preadv, []

        def preadv(file: int, buffers: Any, at: int, *flags: int) -> int:
            inside = Path(os.readlink(f"/proc/self/fd/{file}")).is_relative_to(tmp_path / "in")
            if inside == (disk == "in") and at > 1000:
                failed.append(file)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(file, buffers, at, *flags)

        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", preadv)
            result = call("merge", recipe, tmp_path / "out")
        assert failed
        assert result.code == code
        assert re.search(told, result.err.replace("\n", " ")), result.err
        assert not (tmp_path / "out").exists()
        assert call("merge", recipe, tmp_path / "out").code == 0
        assert folder_hash(tmp_path / "out") == whole(recipe)

    def test_short_reads_are_read_on(
        self, recipe: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = os.preadv
        monkeypatch.setattr(os, "preadv", lambda file, buffers, at, *flags: real(file, [buffers[0][:1000]], at, *flags))
        plait.merge(recipe, tmp_path / "out")
        assert folder_hash(tmp_path / "out") == whole(recipe)

    @pytest.mark.parametrize("when", ["planned", "merging"])
    def test_a_file_that_is_cut(self, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
        victim = tmp_path / "in" / "two" / "model.safetensors"
        told = "changed while" if when == "planned" else "too short while it was read"
        if when == "merging":
            act = meanwhile(5, lambda: os.truncate(victim, 3000))
            monkeypatch.setattr(SafetensorsSource, "read", act(SafetensorsSource.read))
        with pytest.raises(CheckpointError, match=told):
            carry_out(recipe, tmp_path / "out", (lambda: os.truncate(victim, 3000)) if when == "planned" else None)
        assert not (tmp_path / "out").exists()


def carry_out(recipe: Path, out: Path, between: Callable[[], Any] | None) -> None:
    """A merge, with something between its plan and its run."""
    plan = make_plan(load_recipe(recipe))
    try:
        if between is not None:
            between()
        run(plan, out, memory=10**9, threads=1, device="cpu", shard_size=10**9, overwrite=False, progress=Silent())
    finally:
        plan.library.close()


def other_bytes(path: Path) -> None:
    """Change one byte and leave all else, as a copy over the file would."""
    with open(path, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\x11")


def another_file(path: Path) -> None:
    """Another file takes the name; what was opened stays readable."""
    shutil.copy(path, path.with_name("new"))
    other_bytes(path.with_name("new"))
    os.replace(path.with_name("new"), path)


class TestInputsThatChange:
    @pytest.mark.parametrize("change", [other_bytes, another_file, os.unlink])
    @pytest.mark.parametrize("when", ["planned", "merging"])
    def test_a_merge_is_refused(
        self, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, when: str
    ) -> None:
        victim = tmp_path / "in" / "two" / "model.safetensors"
        if when == "merging":
            act = meanwhile(9, lambda: change(victim))
            monkeypatch.setattr(SafetensorsSource, "read", act(SafetensorsSource.read))
        with pytest.raises(CheckpointError, match=r"changed while|no longer there|does not exist"):
            carry_out(recipe, tmp_path / "out", (lambda: change(victim)) if when == "planned" else None)
        assert not (tmp_path / "out").exists()
        assert when == "planned" or change is os.unlink or not hidden(tmp_path)

    def test_a_fit_is_refused(
        self, call: Call, mini: MiniSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = learned(
            MiniSuite(tmp_path / "suite", mini.suite, mini.rows), mini.copy(tmp_path / "suite").parent.parent
        )
        act = meanwhile(30, lambda: os.utime(tmp_path / "suite" / "experts" / "tone" / "model.safetensors"))
        monkeypatch.setattr(SafetensorsSource, "read", act(SafetensorsSource.read))
        result = call("fit", path, tmp_path / "state")
        assert result.code == 3
        assert "was changed while" in result.err
        assert not (tmp_path / "state").exists()


class TestFoldersThatVanish:
    @pytest.mark.parametrize("again", [False, True])
    def test_the_hidden_folder(
        self, call: Call, recipe: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
    ) -> None:
        """Also where another folder has its name by now: another merge's, half written."""

        def vanish() -> None:
            (partial,) = tmp_path.glob(".out.partial-*")
            shutil.rmtree(partial)
            if again:
                partial.mkdir()
                (partial / "model.safetensors").write_bytes(b"half of another merge")

        with monkeypatch.context() as patch:
            patch.setattr(SafetensorsSource, "read", meanwhile(20, vanish)(SafetensorsSource.read))
            result = call("merge", recipe, tmp_path / "out")
        assert result.code == 1
        assert "was removed while the merge was written" in result.err
        assert not (tmp_path / "out").exists()
        assert call("merge", recipe, tmp_path / "out").code == 0
        assert folder_hash(tmp_path / "out") == whole(recipe)

    def test_everything_around_it(
        self, call: Call, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        act = meanwhile(20, lambda: shutil.rmtree(tmp_path / "place"))
        monkeypatch.setattr(SafetensorsSource, "read", act(SafetensorsSource.read))
        result = call("merge", recipe, tmp_path / "place" / "out")
        assert result.code == 1
        assert "was removed while the merge was written" in result.err
        assert not (tmp_path / "place").exists()

    def test_the_older_output(self, recipe: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shutil.copytree(tmp_path / "in" / "one", tmp_path / "out")
        act = meanwhile(20, lambda: shutil.rmtree(tmp_path / "out"))
        monkeypatch.setattr(SafetensorsSource, "read", act(SafetensorsSource.read))
        plait.merge(recipe, tmp_path / "out", overwrite=True)
        assert folder_hash(tmp_path / "out") == whole(recipe)
        assert not hidden(tmp_path)


class TestTwoAtOnce:
    @pytest.mark.parametrize("same", [True, False])
    def test_the_second_is_told(
        self, recipe: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool
    ) -> None:
        second = tmp_path / "second.json"
        second.write_text(json.dumps({**json.loads(recipe.read_text()), **({} if same else {"seed": 5})}))

        def start_another() -> None:
            with pytest.raises(MachineError, match="another merge is writing this folder now; wait for it to end"):
                plait.merge(second, tmp_path / "out")

        monkeypatch.setattr(SafetensorsSource, "read", meanwhile(40, start_another)(SafetensorsSource.read))
        plait.merge(recipe, tmp_path / "out", threads=1)
        assert folder_hash(tmp_path / "out") == whole(recipe)
        assert not hidden(tmp_path)

    def test_what_appears_meanwhile_is_not_replaced(
        self, call: Call, recipe: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def appear() -> None:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "mine.txt").write_text("precious")

        with monkeypatch.context() as patch:
            patch.setattr(SafetensorsSource, "read", meanwhile(20, appear)(SafetensorsSource.read))
            result = call("merge", recipe, tmp_path / "out")
        assert result.code == 2
        assert "exists already; choose another folder, or add --overwrite" in result.err
        assert (tmp_path / "out" / "mine.txt").read_text() == "precious"
        assert plait.merge(recipe, tmp_path / "out", overwrite=True).resumed == 30
        assert folder_hash(tmp_path / "out") == whole(recipe)

    def test_two_fits(self, mini: MiniSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from plait.learn import loop

        path = learned(mini, tmp_path)

        def start_another() -> None:
            with pytest.raises(MachineError, match="another fit is writing this state now"):
                plait.fit(path, tmp_path / "state")

        monkeypatch.setattr(loop, "_save", meanwhile(1, start_another)(loop._save))
        plait.fit(path, tmp_path / "state")
        assert not hidden(tmp_path)


class TestReplacing:
    def test_a_kill_after_the_exchange(
        self, recipe: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The older output then has the hidden name: nothing of it may get into the new one."""
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("old")
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *given, **named: stop())
            with pytest.raises(KeyboardInterrupt):
                plait.merge(recipe, tmp_path / "out", overwrite=True)
        assert folder_hash(tmp_path / "out") == whole(recipe)
        (left,) = tmp_path.glob(".out.partial-*")
        assert (left / "mine.txt").exists()
        plait.merge(recipe, tmp_path / "out", overwrite=True)
        assert folder_hash(tmp_path / "out") == whole(recipe)
        assert not hidden(tmp_path)

    def test_a_file_system_that_cannot_exchange(
        self, recipe: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two renames then; a kill between them leaves the older output aside, and the next run puts it back."""
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("old")
        monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *given, **named: None)
        rename = os.rename
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", at_call(2, lambda *given: stop())(rename))
            with pytest.raises(KeyboardInterrupt):
                plait.merge(recipe, tmp_path / "out", overwrite=True)
        assert not (tmp_path / "out").exists()
        with pytest.raises(RecipeError, match="exists already"):
            plait.merge(recipe, tmp_path / "out")
        assert (tmp_path / "out" / "mine.txt").read_text() == "old"
        plait.merge(recipe, tmp_path / "out", overwrite=True)
        assert folder_hash(tmp_path / "out") == whole(recipe)
        assert not hidden(tmp_path)

    def test_a_link_leads_to_what_is_replaced(self, recipe: Path, whole: Any, tmp_path: Path) -> None:
        (tmp_path / "far").mkdir()
        (tmp_path / "out").symlink_to("far")
        plait.merge(recipe, tmp_path / "out", overwrite=True)
        assert (tmp_path / "out").is_symlink()
        assert folder_hash(tmp_path / "far") == whole(recipe)

    def test_a_state_stays_until_the_new_one_is_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def write(value: float) -> None:
            numbers = {"a": torch.tensor([value])}
            texts = dict.fromkeys(("method", "paper", "sees", "split"), "x")
            tables: dict[str, Any] = {key: {} for key in ("models", "vectors", "fit", "data", "summary")}
            facts = {**texts, **tables, "tasks": ["a"], "seed": 0}
            write_state(tmp_path / "state", facts, numbers, True, scratch=tmp_path / "work")

        write(1.0)
        before = folder_hash(tmp_path / "state")
        for fault in ("fsync", "rename"):
            with monkeypatch.context() as patch:
                patch.setattr(os, fault, failing(1, errno.ENOSPC)(getattr(os, fault)))
                if fault == "rename":
                    patch.setattr(atomic.ctypes, "CDLL", lambda *given, **named: None)
                with pytest.raises(OSError, match="No space left"):
                    write(2.0)
            assert folder_hash(tmp_path / "state") == before
        write(2.0)
        assert folder_hash(tmp_path / "state") != before


def stop() -> None:
    raise KeyboardInterrupt


def test_what_was_not_synced_before_a_reboot_is_merged_again(
    recipe: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at the second reboot: what the first run noted and did not sync is not believed later either."""
    from plait import writer

    def interrupted(reads: int, boot: str, sync_seconds: float) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "boot", lambda: boot)
            patch.setattr(writer, "_SYNC_SECONDS", sync_seconds)
            patch.setattr(SafetensorsSource, "read", failing(reads, errno.EIO)(SafetensorsSource.read))
            with pytest.raises(CheckpointError):
                plait.merge(recipe, tmp_path / "out", threads=1)

    def noted() -> list[Any]:
        (journal,) = tmp_path.glob(".out.partial-*/.journal")
        return [json.loads(line) for line in journal.read_text().splitlines()]

    interrupted(60, "first", 1e9)
    lost = [entry for entry in noted() if isinstance(entry, str)]
    assert len(lost) > 2
    for name in tmp_path.glob(".out.partial-*/*.safetensors"):  # a power cut: the pages never reached the disk
        name.write_bytes(bytes(name.stat().st_size))
    interrupted(20, "second", 0.0)
    assert {"synced": True} in noted()
    assert not set(lost) <= {entry for entry in noted() if isinstance(entry, str)}
    monkeypatch.setattr(atomic, "boot", lambda: "third")
    plait.merge(recipe, tmp_path / "out")
    assert folder_hash(tmp_path / "out") == whole(recipe)


def test_a_fit_that_is_killed_after_its_last_step_ends_alike(
    mini: MiniSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Routers tell of their last step, which a fit that goes on does not take again."""
    path = learned(mini, tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "merge_method": "wemoe"}))
    plait.fit(path, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("plait.learn.fit.write_state", lambda *given, **named: stop())
        with pytest.raises(KeyboardInterrupt):
            plait.fit(path, tmp_path / "killed")
    plait.fit(path, tmp_path / "killed", resume=True)
    for name in ("state.json", "state.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.fixture(autouse=True)
def _no_leak() -> Iterator[None]:
    """No fault may leave a descriptor open."""
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    yield
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 2
