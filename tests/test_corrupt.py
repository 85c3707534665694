"""Corruptions do what their definitions say; and models are measured under them as a plain loop would do it."""

from __future__ import annotations

import csv
import io
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import mini_images
import numpy as np
import pytest
import torch
import transformers
from mini_images import CLASSES
from mini_suite import MiniSuite
from numpy.typing import NDArray
from PIL import Image

import plait.evaluate.subjects
from plait import cli
from plait.errors import RecipeError
from plait.evaluate.compare import compare
from plait.evaluate.corrupt import NAMES, SEVERITIES, corrupt
from plait.evaluate.measure import Bench, Options
from plait.evaluate.metrics import interval, resampled
from plait.evaluate.results import Comparison, Corruption, Evaluation, Robustness, dump, load
from plait.evaluate.robust import corruptions, robustness
from plait.evaluate.subjects import Subject
from plait.evaluate.tables import comparison_csv, comparison_markdown
from plait.models.net import Sample, load_net
from plait.report import render
from plait.run import merge
from plait.suites.definition import Suite

RANDOM = ("motion", "impulse", "gaussian", "spatter")
TASKS = list(CLASSES)


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft colours, hard edges and a fine pattern: something for every corruption to spoil."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    phases = random.uniform(0, 6, 3)
    pixels = 110 + 60 * np.sin(6 * x[..., None] + 4 * y[..., None] + phases)
    for _ in range(6):
        left, top = random.uniform(0, 0.8, 2)
        pixels[(x > left) & (x < left + 0.2) & (y > top) & (y < top + 0.2)] = random.uniform(0, 255, 3)
    pixels[y > 0.8] += 40 * ((np.arange(width) + np.arange(height)[:, None]) % 2)[y > 0.8][:, None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def spoilt(image: Image.Image, name: str, severity: int = 3, row: int = 0) -> Image.Image:
    return corrupt(image, name, severity, seed=0, task="t", row=row)


def numbers(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image, dtype=np.float64)


# ---------------------------------------------------------------- what holds for all of them


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(32, 32), (224, 224)])
def test_a_higher_severity_is_further_from_the_image(name: str, size: tuple[int, int]) -> None:
    scenes = [scene(*size, seed=seed) for seed in range(24 if size[0] == 32 else 6)]
    far = [
        float(np.mean([np.mean((numbers(s) - numbers(spoilt(s, name, v, r))) ** 2) for r, s in enumerate(scenes)]))
        for v in SEVERITIES
    ]
    assert far[0] > 0
    steps = [one < other for one, other in itertools.pairwise(far)]
    if name == "spatter":  # water up to 3, then mud: two kinds, each of which gets worse
        assert [*steps[:2], *steps[3:]] == [True] * 3, far
    elif (name, size[0]) == ("motion", 32):  # from 3 to 4 CIFAR-10-C only lengthens the empty tail of its blur
        assert steps == [True, True, False, True], far
        assert far[2] == far[3]
    else:
        assert steps == [True] * 4, far


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(28, 28), (61, 40), (1, 1), (3, 90), (300, 200)])
def test_size_and_mode_stay(name: str, mode: str, size: tuple[int, int]) -> None:
    image = scene(*size).convert(mode)
    before = image.tobytes()
    for severity in (1, 3, 5):
        found = spoilt(image, name, severity)
        assert (found.size, found.mode) == (size, mode)
        assert found is not image
    assert image.tobytes() == before, "the image that was given is left alone"


@pytest.mark.parametrize("name", NAMES)
def test_transparency_stays_and_colours_are_spoilt_as_without_it(name: str) -> None:
    image = scene(40, 36)
    alpha = Image.fromarray(np.arange(40 * 36, dtype=np.uint16).reshape(36, 40).astype(np.uint8))
    image.putalpha(alpha)
    found = spoilt(image, name)
    assert found.getchannel("A").tobytes() == alpha.tobytes()
    assert found.convert("RGB").tobytes() == spoilt(image.convert("RGB"), name).tobytes()


def test_modes_that_are_not_known() -> None:
    with pytest.raises(ValueError, match="mode P cannot be corrupted; convert it"):
        spoilt(scene(8, 8).convert("P"), "jpeg")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_random_depends_on_seed_task_and_row_alone(name: str) -> None:
    image = scene(32, 32)
    first = corrupt(image, name, 3, seed=0, task="a", row=7).tobytes()
    np.random.seed(1)
    for other in NAMES:
        spoilt(image, other)
    assert corrupt(image, name, 3, seed=0, task="a", row=7).tobytes() == first
    others = [
        corrupt(image, name, 3, seed=seed, task=task, row=row).tobytes()
        for seed, task, row in ((1, "a", 7), (0, "b", 7), (0, "a", 8))
    ]
    assert len({first, *others}) == (4 if name in RANDOM else 1)


# ---------------------------------------------------------------- each by its definition


def grey(size: int, level: int = 128) -> Image.Image:
    return Image.new("RGB", (size, size), (level, level, level))


@pytest.mark.parametrize(
    ("size", "constants"), [(16, (0.04, 0.1)), (32, (0.04, 0.1)), (224, (0.08, 0.38)), (400, (0.08, 0.38))]
)
def test_gaussian_noise_is_as_wide_as_published(size: int, constants: tuple[float, float]) -> None:
    for severity, constant in zip((1, 5), constants, strict=True):
        noise = np.concatenate([numbers(spoilt(grey(size), "gaussian", severity, row)).ravel() for row in range(8)])
        inside = noise[(noise > 0) & (noise < 255)]  # what is cut off makes it narrower
        expected = np.clip(np.random.default_rng(0).normal(128, 255 * constant, 200_000), 0, 255)
        expected = expected[(expected > 0) & (expected < 255)]
        assert inside.std() == pytest.approx(expected.std(), rel=0.06)
        assert noise.mean() == pytest.approx(128, abs=2)


def test_between_the_two_sizes_constants_go_by_the_logarithm() -> None:
    """85 is halfway from 32 to 224: 0.06 lies halfway from 0.04 to 0.08."""
    found = numbers(spoilt(grey(85), "gaussian", 1)).std() / 255
    assert found == pytest.approx(0.06, rel=0.03)
    assert numbers(spoilt(Image.new("RGB", (300, 85), (128, 128, 128)), "gaussian", 1)).std() / 255 == pytest.approx(
        0.06, rel=0.03
    ), "the shorter side decides"


@pytest.mark.parametrize(("size", "severity", "amount"), [(32, 1, 0.01), (32, 5, 0.07), (224, 5, 0.27)])
def test_impulses_are_black_and_white_and_as_many_as_published(size: int, severity: int, amount: float) -> None:
    found = np.stack([numbers(spoilt(grey(size), "impulse", severity, row)) for row in range(12)])
    hit = found != 128
    assert set(np.unique(found)) == {0, 128, 255}
    assert hit.mean() == pytest.approx(amount, rel=0.12)
    assert (found[hit] == 255).mean() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(("size", "radius", "sigma"), [(32, 9, 2.5), (224, 20, 15), (448, 40, 30)])
def test_motion_blur_is_half_a_gaussian_along_a_line(size: int, radius: int, sigma: float) -> None:
    """Beyond 224 pixels, lengths grow with the image."""
    dot = np.zeros((size, size), dtype=np.uint8)
    dot[size // 2, size // 2] = 255
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-((steps / sigma) ** 2) / 2)
    angles = []
    for row in range(8):
        found = numbers(spoilt(Image.fromarray(dot), "motion", 5, row))
        down, right = np.argwhere(found > 0).T - size // 2
        light = found[found > 0]
        assert light.sum() == pytest.approx(255, rel=0.1), "it keeps all light, but for rounding"
        assert right.max() == 0, "on one side of the dot"
        assert (np.abs(down) <= np.abs(right) + 1).all(), "at most 45 degrees"
        centre = np.hypot((down * light).sum(), (right * light).sum()) / light.sum()
        assert centre == pytest.approx((steps * weights).sum() / weights.sum(), rel=0.1, abs=0.3)
        angles.append(np.arctan2((down * light).sum(), -(right * light).sum()))
    assert np.ptp(angles) > 0.5, "every row has an angle of its own"


def test_motion_blur_keeps_mean_brightness_and_flattens() -> None:
    """With a border of one colour, beyond which there is more of it."""
    framed = Image.new("RGB", (120, 120), (90, 90, 90))
    framed.paste(scene(40, 40), (40, 40))
    for severity in SEVERITIES:
        found = numbers(spoilt(framed, "motion", severity))
        assert found.mean() == pytest.approx(numbers(framed).mean(), abs=0.3)
        assert np.abs(np.diff(found, axis=1)).mean() < np.abs(np.diff(numbers(framed), axis=1)).mean()


@pytest.mark.parametrize(("size", "constants"), [(32, [0.75, 0.5, 0.4, 0.3, 0.15]), (224, [0.4, 0.3, 0.2, 0.1, 0.05])])
def test_contrast_keeps_the_mean_of_every_channel(size: int, constants: list[float]) -> None:
    image = numbers(scene(size, size))
    for severity, constant in zip(SEVERITIES, constants, strict=True):
        found = numbers(spoilt(scene(size, size), "contrast", severity))
        assert found.mean(axis=(0, 1)) == pytest.approx(image.mean(axis=(0, 1)), abs=0.3)
        assert found.std() > 0
        assert np.abs(found - (image.mean(axis=(0, 1)) + constant * (image - image.mean(axis=(0, 1))))).max() <= 0.51


@pytest.mark.parametrize(("size", "qualities"), [(32, [80, 65, 58, 50, 40]), (224, [25, 18, 15, 10, 7])])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_is_a_round_trip_through_a_file(size: int, qualities: list[int], mode: str) -> None:
    image = scene(size, size).convert(mode)
    for severity, quality in zip(SEVERITIES, qualities, strict=True):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        assert spoilt(image, "jpeg", severity).tobytes() == Image.open(file).tobytes()


@pytest.mark.parametrize(("size", "small"), [(32, [30, 28, 27, 24, 20]), (224, [134, 112, 89, 67, 56])])
def test_pixelate_keeps_so_many_pixels(size: int, small: list[int]) -> None:
    image = scene(size, size)
    for severity, side in zip(SEVERITIES, small, strict=True):
        box = Image.Resampling.BOX
        assert (
            spoilt(image, "pixelate", severity).tobytes()
            == image.resize((side, side), box).resize((size, size), box).tobytes()
        )
    blocks = numbers(spoilt(scene(224, 224), "pixelate", 5)).reshape(56, 4, 56, 4, 3)
    assert (blocks == blocks[:, :1, :, :1]).all(), "boxes of one colour"


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_spatter_is_water_and_then_mud(size: int, severity: int) -> None:
    changed = []
    for row in range(6):
        before = numbers(grey(size, 100))
        after = numbers(spoilt(grey(size, 100), "spatter", severity, row))
        drops = (before != after).any(axis=-1)
        changed.append(drops.mean())
        if severity <= 3:
            assert (after >= before).all(), "water shines"
            red, green, blue = (after - before)[drops].reshape(-1, 3).sum(axis=0) if drops.any() else (0, 1, 1)
            assert red < green == pytest.approx(blue)
        else:
            assert (after <= before).all(), "mud is darker than this grey"
            deepest = after[drops].min(axis=0) if drops.any() else np.array([63, 42, 20])
            assert deepest == pytest.approx([63, 42, 20], abs=12)
    assert 0.001 < np.mean(changed) < 0.5, "some of the image, and not most of it"


def test_mud_on_grey_images_is_as_dark_as_its_colour() -> None:
    found = numbers(spoilt(Image.new("L", (224, 224), 200), "spatter", 5))
    assert found.min() == pytest.approx(0.299 * 63 + 0.587 * 42 + 0.114 * 20, abs=2)


# ---------------------------------------------------------------- models under corruptions


@pytest.fixture(autouse=True)
def _cache(pictures: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.utils.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    monkeypatch.setenv("PLAIT_CACHE", str(pictures.folder / "cache"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    datasets.utils.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    return mini_images.make(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def merged(pictures: Suite) -> Path:
    """Of all experts but the one of hue."""
    out = pictures.folder / "model"
    merge(pictures.only(["shade", "half"]).recipe("average"), out)
    return out


@pytest.fixture
def bench(pictures: Suite) -> Bench:
    return Bench(pictures)


UNDER = Corruption(name="impulse", severity=5)


def test_predictions_are_those_of_a_plain_loop_over_corrupted_images(
    pictures: Suite, bench: Bench, merged: Path
) -> None:
    found = bench.under(UNDER).evaluate(Subject.model(pictures, str(merged)))
    clean = bench.evaluate(Subject.model(pictures, str(merged)))
    assert found.protocol.corruption == UNDER
    assert clean.protocol.corruption is None
    net = load_net(merged, "model", processor_from=pictures.folder / "base")
    subject = Subject.model(pictures, str(merged))
    for task in TASKS:
        head, _ = subject._head(task, CLASSES[task])
        net.add_heads({task: head}, {task: CLASSES[task]})
        answers = []
        for row in range(len(bench.splits[task])):
            image = corrupt(bench.splits[task][row], "impulse", 5, seed=0, task=task, row=row)
            with torch.inference_mode():
                answers.append(int(net.scores(net.collate([Sample(task, image)]))[task].argmax()))
        assert found.tasks[task].predictions == answers
    assert any(found.tasks[task].predictions != clean.tasks[task].predictions for task in TASKS)


def test_batches_and_tasks_change_no_corruption(pictures: Suite, bench: Bench, merged: Path) -> None:
    subject = Subject.model(pictures, str(merged))
    whole = bench.under(UNDER).evaluate(subject)
    other = Bench(pictures, Options(batch_size=7)).under(UNDER).evaluate(subject)
    alone = bench.under(UNDER).evaluate(subject, tasks=["hue"])
    assert {task: r.predictions for task, r in other.tasks.items()} == {
        task: r.predictions for task, r in whole.tasks.items()
    }
    assert alone.tasks["hue"].predictions == whole.tasks["hue"].predictions


def test_both_yardsticks_by_hand(pictures: Suite, bench: Bench, merged: Path) -> None:
    found = robustness(merged, pictures, [UNDER], unseen=["hue"])
    one = found.corrupted[0]
    experts = {"clean": bench.experts(), "alike": bench.under(UNDER).experts()}
    assert found.clean == Bench(pictures, unseen=["hue"]).evaluate(Subject.model(pictures, str(merged)))
    shares: dict[str, list[float]] = {"clean": [], "alike": []}
    draws: dict[str, list[Any]] = {"clean": [], "alike": []}
    for task, result in one.evaluation.tasks.items():
        ours = resampled(task, "accuracy", result.labels, result.predictions)
        for which, rows in experts.items():
            expert = rows.tasks[task]
            shares[which].append(result.score.value / expert.score.value)
            draws[which].append(ours / resampled(task, "accuracy", expert.labels, expert.predictions))
        assert result.expert == experts["clean"].tasks[task].score.value
        assert one.experts[task] == experts["alike"].tasks[task].score.value
    for which, share in (("clean", one.evaluation.normalised), ("alike", one.normalised_alike)):
        expected = interval(float(np.mean(shares[which])), np.mean(draws[which], axis=0))
        assert share is not None
        assert share.model_dump() == pytest.approx(expected.model_dump())
    assert shares["clean"] != shares["alike"], "the experts suffer too"
    under = experts["alike"].normalised
    assert under is not None
    assert under.value < 1, "the experts' row shows what they lose"
    for evaluation in (found.clean, one.evaluation):
        assert evaluation.seen is not None
        assert evaluation.unseen is not None
        assert (evaluation.seen.tasks, evaluation.unseen.tasks) == (["shade", "half"], ["hue"])
        scores = {task: result.score.value for task, result in evaluation.tasks.items()}
        assert evaluation.seen.average.value == pytest.approx((scores["shade"] + scores["half"]) / 2)
        assert evaluation.unseen.average.value == pytest.approx(scores["hue"])
        assert evaluation.average.value == pytest.approx(np.mean(list(scores.values())))


def test_an_evaluation_is_filed_under_its_corruption(
    pictures: Suite, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    loaded: list[str] = []
    whole = plait.evaluate.subjects.load_net

    def noted(folder: Path, label: str, **how: Any) -> Any:
        loaded.append(label)
        return whole(folder, label, **how)

    monkeypatch.setattr(plait.evaluate.subjects, "load_net", noted)

    def runs(*under: Corruption) -> int:
        loaded.clear()
        robustness(merged, pictures, under)
        return loaded.count("model")

    severe = [Corruption(name="gaussian", severity=severity) for severity in (2, 5)]
    assert runs(severe[0]) == 2, "clean and corrupted"
    assert runs(severe[0]) == 0
    assert runs(severe[1]) == 1, "another severity"
    assert runs(Corruption(name="impulse", severity=2)) == 1, "another corruption"
    assert runs(*severe) == 0
    assert not loaded, "nor any expert"


def test_results_come_back_as_they_were(pictures: Suite, merged: Path, tmp_path: Path) -> None:
    found = robustness(merged, pictures, [UNDER, Corruption(name="jpeg", severity=1)])
    (tmp_path / "x.json").write_text(dump(found))
    assert load(tmp_path / "x.json") == found
    page = render([found, found.clean])
    for word in ("Under corruptions", "impulse 5", "jpeg 1"):
        assert word in page
    assert "Under corruptions" not in render([found.clean])


# ---------------------------------------------------------------- the command line


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


Call = Callable[..., Said]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["plait", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        out, err = capsys.readouterr()
        return Said(code, out, err)

    return run


def test_eval_under_corruptions(call: Call, pictures: Suite, merged: Path, tmp_path: Path) -> None:
    words = ["eval", merged, "--suite", pictures.folder, "--corrupt", "motion,jpeg, motion", "--severity", "2"]
    found = call(*words, "--unseen", "hue", "--quiet")
    assert (found.code, found.err) == (0, "")
    lines = {line.split("  ")[0].strip(): line for line in found.out.splitlines()}
    header = next(line for line in found.out.splitlines() if line.strip().startswith("images"))
    assert header.split() == ["images", *TASKS, "(unseen)", "seen", "unseen", "average", "normalised", "alike"]
    told = call(*words, "--json", "--unseen", "hue")
    (tmp_path / "x.json").write_text(told.out)
    data = load(tmp_path / "x.json")
    assert isinstance(data, Robustness)
    assert [one.evaluation.protocol.corruption for one in data.corrupted] == [
        Corruption(name="motion", severity=2), Corruption(name="jpeg", severity=2)
    ]  # fmt: skip
    for name, evaluation in (("clean", data.clean), ("motion 2", data.corrupted[0].evaluation)):
        for result in evaluation.tasks.values():
            assert f"{100 * result.score.value:.1f}" in lines[name]
    page = call("report", tmp_path / "x.json", "--out", tmp_path / "x.html")
    assert page.code == 0
    assert "motion 2" in (tmp_path / "x.html").read_text()
    assert json.loads(call(*words[:4], "--json").out)["schema"] == "plait.evaluation/1"
    middle = json.loads(call("eval", merged, "--suite", pictures.folder, "--corrupt", "contrast", "--json").out)
    assert middle["corrupted"][0]["evaluation"]["protocol"]["corruption"] == {"name": "contrast", "severity": 3}


REFUSED = {
    "name": (["--corrupt", "motion,gausian"], "--corrupt gausian: is no corruption; did you mean 'gaussian'?"),
    "no name": (["--corrupt", ""], "is no corruption; known: contrast, gaussian, impulse,"),
    "too strong": (["--corrupt", "jpeg", "--severity", "6"], "--severity 6: must be a whole number from 1 (faint)"),
    "too faint": (["--corrupt", "jpeg", "--severity", "0"], "--severity 0: must be a whole number from 1"),
    "severity alone": (["--severity", "2"], "--severity 2: says how strong corruptions are; name them with --corrupt"),
    "unseen": (["--unseen", "hues"], "--unseen hues: pictures has no such task; did you mean 'hue'?"),
    "all unseen": (["--unseen", "hue,half,shade"], "--unseen hue,half,shade: these are all the tasks, and none"),
    "seen": (["--unseen", "hue,half"], "model was merged from the expert of half, as its plait.json says; leave half"),
    "seen, under": (["--unseen", "half", "--corrupt", "jpeg"], "--unseen half: "),
    "only": (["--unseen", "hue", "-t", "half"], "--unseen hue: pictures has no such task"),
}  # fmt: skip


@pytest.mark.parametrize("which", REFUSED)
def test_refused_before_any_model_is_loaded(
    call: Call, pictures: Suite, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    monkeypatch.setattr(plait.evaluate.subjects, "load_net", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    words, message = REFUSED[which]
    found = call("eval", merged, "--suite", pictures.folder, *words)
    assert message in found.err
    assert (found.code, found.out) == (2, "")
    assert len(found.err.strip().splitlines()) == 1


def test_texts_are_not_corrupted(call: Call, mini: MiniSuite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plait.evaluate.subjects, "load_net", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    for verb in (["eval", mini.base], ["compare", "--out", tmp_path / "out"]):
        found = call(*verb, "--suite", mini.root, "--corrupt", "jpeg")
        assert "--corrupt jpeg: the inputs of tone are texts, and corruptions are for images; leave" in found.err
        assert (found.code, found.out) == (2, "")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- comparisons


def test_compare_unseen_and_corrupted(call: Call, pictures: Suite, merged: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "plain.yaml").write_text("merge_method: ties\nparameters: {density: 0.5}\n")
    found = call(
        "compare", "regmean", tmp_path / "plain.yaml", f"mine={merged}", "--suite", pictures.folder, "--out", out,
        "--unseen", "hue", "--corrupt", "jpeg,impulse", "--severity", "5", "--quiet",
    )  # fmt: skip
    assert (found.code, found.err) == (0, "")
    for word in ("hue (unseen)", "seen", "under corruptions: normalised, %", "impulse 5", "alike"):
        assert word in found.out
    written = load(out / "comparison.json")
    assert isinstance(written, Comparison)
    names = ["experts", "base + heads", "average", "task_arithmetic", "regmean", "plain", "mine"]
    assert [row.label for row in written.rows] == names
    for row in written.rows:
        assert list(row.evaluation.tasks) == TASKS, "everything is measured"
        assert row.evaluation.unseen is not None
        assert row.evaluation.unseen.tasks == ["hue"]
        assert len(row.corrupted) == 2
        if row.recipe is not None:
            assert [entry["name"] for entry in row.recipe["models"]] == ["half", "shade"]
    learned = next(row for row in written.rows if row.label == "regmean").learned
    assert learned is not None
    assert sorted(learned["data"]) == ["half", "shade"], "nothing is learned from what is unseen"
    assert written.inspection is not None
    assert sorted(written.inspection["tasks"]) == ["half", "shade"]
    mine = Bench(pictures, unseen=["hue"]).evaluate(Subject.model(pictures, str(merged), "mine"))
    assert written.rows[-1].evaluation == mine
    rows = list(csv.DictReader(io.StringIO(comparison_csv(written))))
    for line, row in zip(rows, written.rows, strict=True):
        assert row.evaluation.seen is not None
        assert float(line["seen_average"]) == row.evaluation.seen.average.value
        assert float(line["jpeg 5 average"]) == row.corrupted[0].evaluation.average.value
    text = comparison_markdown(written)
    assert "| model | clean | jpeg 5 | impulse 5 | mean | alike |" in text
    page = (out / "report.html").read_text()
    assert "unseen, %" in page
    assert "hue: accuracy, %; its expert was not merged" in page


def test_what_merges_an_unseen_expert_is_refused(
    call: Call, pictures: Suite, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plait.evaluate.subjects, "load_net", lambda *_, **__: pytest.fail("a model was loaded"))
    bench = Bench(pictures, unseen=["half"])
    data = pictures.recipe("average")
    by_name = {**data, "models": [data["models"][0], {"model": str(merged), "name": "half"}]}
    by_place = {**data, "models": [{**entry, "name": f"x{n}"} for n, entry in enumerate(data["models"])]}
    as_base = {**pictures.only(["hue", "shade"]).recipe("average"), "base_model": data["models"][1]["model"]}
    for number, recipe in enumerate((by_name, by_place, as_base)):
        path = tmp_path / f"r{number}.json"
        path.write_text(json.dumps(recipe))
        with pytest.raises(
            RecipeError, match=rf"--unseen half: the recipe r{number} merges the expert of half; remove"
        ):
            compare([str(path)], bench, tmp_path / "out")
    with pytest.raises(RecipeError, match=r"--unseen half: .*model was merged from the expert of half, as its plait"):
        compare([str(merged)], bench, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_expert_under_another_name_is_known_by_its_fingerprint(pictures: Suite, tmp_path: Path) -> None:
    data = pictures.recipe("average")
    models = [{**entry, "name": f"x{number}"} for number, entry in enumerate(data["models"][:2])]
    merge({**data, "models": models}, tmp_path / "renamed")
    with pytest.raises(RecipeError, match="merged from the expert of shade"):
        robustness(tmp_path / "renamed", pictures, [UNDER], unseen=["shade"])
    (tmp_path / "renamed" / "plait.json").write_text("[1, 2")
    found = robustness(tmp_path / "renamed", pictures, [], unseen=["shade"])
    assert isinstance(found.clean, Evaluation), "without provenance one's word is taken"


def test_corruptions_by_name() -> None:
    assert corruptions([]) == []
    assert corruptions(["jpeg", "motion", "jpeg"], 4) == [
        Corruption(name="jpeg", severity=4), Corruption(name="motion", severity=4)
    ]  # fmt: skip
