"""Measuring: what comes out is what plain transformers, scikit-learn and a hand calculation give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import pico
import pytest
import sklearn.metrics
import torch
import transformers
import yaml
from mini_suite import CLASSES, TEST, WORDS, MiniSuite, add_tokenizer, features
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor

from plait.errors import CheckpointError, MachineError, RecipeError
from plait.evaluate import metrics
from plait.evaluate.clock import Clock
from plait.evaluate.measure import Bench, Options, evaluate
from plait.evaluate.metrics import difference, interval, measure, resampled
from plait.evaluate.results import Evaluation, dump, load
from plait.evaluate.subjects import Subject
from plait.models.net import Net, Sample
from plait.run import merge
from plait.suites.definition import Suite, read_suite, suite_of

TASKS = list(CLASSES)


@pytest.fixture(autouse=True)
def _cache(mini: MiniSuite, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.utils.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    monkeypatch.setenv("PLAIT_CACHE", str(mini.cache))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "own"))
    return tmp_path / "own"


@pytest.fixture(scope="module")
def bench(mini: MiniSuite) -> Bench:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLAIT_CACHE", str(mini.cache))
        return Bench(mini.suite)


@pytest.fixture(scope="module")
def merged(mini: MiniSuite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "average"
    merge(mini.suite.recipe("average"), out)
    return out


# ---------------------------------------------------------------- metrics

LABELS = {
    "f1": [0, 1, 1, 0, 1, 0, 1, 1, 0, 0], "f1_macro": [0, 1, 2, 0, 1, 2, 0, 1, 2, 2],
    "matthews": [0, 1, 2, 0, 1, 2, 0, 1, 2, 2], "accuracy": [0, 1, 2, 0, 1, 2, 0, 1, 2, 2],
    "pearson": [0.1, 2.5, 3.0, 1.0, 4.5, 5.0, 0.0, 2.0, 3.5, 1.5], "exact_match": ["a", "b", "c d", "", "a"],
}  # fmt: skip
ANSWERS = {
    "f1": [0, 1, 0, 0, 1, 1, 1, 1, 0, 1], "f1_macro": [0, 2, 2, 0, 1, 1, 0, 1, 0, 2],
    "matthews": [0, 2, 2, 0, 1, 1, 0, 1, 0, 2], "accuracy": [0, 2, 2, 0, 1, 1, 0, 1, 0, 2],
    "pearson": [0.3, 2.0, 3.5, 1.5, 3.5, 5.5, 1.0, 1.0, 3.0, -1.5], "exact_match": ["a", "B", "c d", "x", " a"],
}  # fmt: skip
LABELS["spearman"], ANSWERS["spearman"] = LABELS["pearson"], ANSWERS["pearson"]
SCIPY: Any = stats  # its types hide what its results have
PLAIN: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": sklearn.metrics.accuracy_score,
    "f1": sklearn.metrics.f1_score,
    "f1_macro": lambda y, a: float(sklearn.metrics.f1_score(y, a, average="macro")),
    "matthews": sklearn.metrics.matthews_corrcoef,
    "pearson": lambda y, a: float(SCIPY.pearsonr(y, a).statistic),
    "spearman": lambda y, a: float(SCIPY.spearmanr(y, a).statistic),
    "exact_match": lambda y, a: sum(one == other for one, other in zip(y, a, strict=True)) / len(y),
}


@pytest.mark.parametrize("metric", metrics.METRICS)
def test_metrics_are_scikit_learns_and_scipys(metric: str) -> None:
    found = measure(metric, LABELS[metric], ANSWERS[metric])
    assert found == pytest.approx(PLAIN[metric](LABELS[metric], ANSWERS[metric]), abs=1e-12)
    assert 0.2 < found < 0.99


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
@pytest.mark.parametrize("answers", [[1.0] * 10, [float("nan"), *[0.5] * 9]])
def test_answers_without_a_correlation_score_nothing(metric: str, answers: list[float]) -> None:
    assert measure(metric, LABELS[metric], answers) == 0.0


def test_a_class_that_nobody_answers_scores_nothing() -> None:
    assert measure("f1", [0, 1], [0, 0]) == 0.0
    assert measure("matthews", [0, 1], [0, 0]) == 0.0


@pytest.mark.parametrize("metric", metrics.METRICS)
def test_intervals(metric: str) -> None:
    if metric == "exact_match":  # as accuracy
        return
    first = resampled("task", metric, LABELS[metric], ANSWERS[metric])
    found = interval(measure(metric, LABELS[metric], ANSWERS[metric]), first)
    assert found.low < found.value < found.high
    assert first.shape == (metrics.RESAMPLES,)
    assert np.array_equal(first, resampled("task", metric, LABELS[metric], ANSWERS[metric])), "the same every time"
    assert not np.array_equal(first, resampled("other", metric, LABELS[metric], ANSWERS[metric]))


def test_the_interval_of_an_accuracy_is_that_of_a_proportion() -> None:
    labels = [1] * 300
    answers = [1] * 240 + [0] * 60
    found = interval(0.8, resampled("task", "accuracy", labels, answers))
    spread = 1.96 * (0.8 * 0.2 / 300) ** 0.5
    assert (found.low, found.high) == pytest.approx((0.8 - spread, 0.8 + spread), abs=0.006)


def test_intervals_cover_the_truth() -> None:
    """Of 95 % intervals from 200 samples of a model that is right 7 times in 10, about 95 % hold 0.7."""
    random = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        answers = (random.random(100) < 0.7).astype(int).tolist()
        found = interval(float(np.mean(answers)), resampled(f"task {trial}", "accuracy", [1] * 100, answers))
        held += found.low <= 0.7 <= found.high
    assert 0.9 <= held / 200 <= 0.99


def test_the_same_rows_are_drawn_for_every_model() -> None:
    labels = list(range(50))
    wrong_one = [-1, *labels[1:]]
    draws = resampled("task", "accuracy", labels, labels) - resampled("task", "accuracy", labels, wrong_one)
    often = np.random.default_rng(0).binomial(50, 1 / 50, 100_000) / 50
    assert draws.mean() == pytest.approx(often.mean(), abs=0.003)
    assert draws.min() == 0


# ---------------------------------------------------------------- differences


def one(answers: Sequence[Any], theirs: Sequence[Any], labels: Sequence[Any], metric: str = "accuracy") -> Any:
    return difference({"t": answers}, {"t": theirs}, {"t": labels}, {"t": metric})


@pytest.mark.parametrize("metric", metrics.METRICS)
def test_identical_answers_differ_by_nothing(metric: str) -> None:
    found = one(ANSWERS[metric], ANSWERS[metric], LABELS[metric], metric)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_the_better_model_is_found_and_the_sign_is_ours() -> None:
    labels = [0, 1] * 100
    worse = [label if row % 3 else 1 - label for row, label in enumerate(labels)]
    found, other = one(labels, worse, labels), one(worse, labels, labels)
    assert found.value == pytest.approx(67 / 200)
    assert 0 < found.low < found.value < found.high
    assert found.p < 0.001
    assert (other.value, other.low, other.high, other.p) == pytest.approx(
        (-found.value, -found.high, -found.low, found.p)
    )


@pytest.mark.parametrize("metric", ["f1_macro", "pearson"])
def test_other_metrics_are_symmetric_too(metric: str) -> None:
    shifted = [*ANSWERS[metric][3:], *ANSWERS[metric][:3]]
    found = one(ANSWERS[metric], shifted, LABELS[metric], metric)
    other = one(shifted, ANSWERS[metric], LABELS[metric], metric)
    assert (other.value, other.low, other.high, other.p) == pytest.approx(
        (-found.value, -found.high, -found.low, found.p)
    )


def test_p_is_that_of_the_sign_test() -> None:
    """12 samples that only we get right, 4 that only they do: twice the binomial's tail."""
    labels = [1] * 60
    ours = [1] * 12 + [0] * 4 + [1] * 44
    theirs = [0] * 12 + [1] * 4 + [1] * 44
    expected = stats.binomtest(12, 16, 0.5).pvalue
    assert one(ours, theirs, labels).p == pytest.approx(expected, abs=0.01)


def test_the_quick_way_for_accuracy_draws_from_the_same_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    labels = random.integers(0, 3, 80).tolist()
    ours, theirs = (np.where(random.random(80) < share, labels, 9).tolist() for share in (0.8, 0.65))
    monkeypatch.setitem(metrics.METRICS, "slow", lambda y, a: float(np.mean(y == a)))
    draws = {name: resampled("t", name, labels, ours) for name in ("accuracy", "slow")}
    assert np.allclose(draws["accuracy"], draws["slow"], atol=1e-12)
    quick, slow = one(ours, theirs, labels), one(ours, theirs, labels, "slow")
    assert (slow.value, slow.low, slow.high) == pytest.approx((quick.value, quick.low, quick.high))
    assert slow.p == pytest.approx(quick.p, abs=0.03)


def test_p_is_never_below_what_its_draws_can_show() -> None:
    labels = list(np.linspace(0, 1, 40))
    found = one(labels, labels[::-1], labels, "pearson")
    assert found.p == pytest.approx(1 / (1 + metrics.EXCHANGES // 10))


def test_a_difference_is_the_mean_over_tasks_in_any_order() -> None:
    labels = {"a": [0, 1] * 20, "b": [0.0, 1.0, 2.0, 3.0] * 10}
    ours = {"a": [0, 1] * 20, "b": [0.0, 1.0, 2.0, 2.5] * 10}
    theirs = {"a": [0, 0] * 20, "b": [1.0, 1.5, 2.0, 0.0] * 10}
    kinds = {"a": "accuracy", "b": "pearson"}
    found = difference(ours, theirs, labels, kinds)
    parts = [measure(kinds[t], labels[t], ours[t]) - measure(kinds[t], labels[t], theirs[t]) for t in labels]
    assert found.value == pytest.approx(np.mean(parts))
    turned = difference(ours, theirs, labels, dict(reversed(kinds.items())))
    assert (turned.value, turned.low, turned.high, turned.p) == pytest.approx(
        (found.value, found.low, found.high, found.p)
    )


# ---------------------------------------------------------------- a bench, beside plain transformers


def plain_predictions(mini: MiniSuite, model: Path, task: str) -> list[int]:
    """An encoder, the mean of its states, and the task's head: one input at a time."""
    head = mini.head(task)
    logits = features(model, mini.rows[task]["test"].inputs) @ head["weight"].T + head["bias"]
    return logits.argmax(dim=1).tolist()


@pytest.fixture(scope="module")
def loaded(mini: MiniSuite, merged: Path) -> dict[str, Path]:
    """A merged model brings a tokenizer from the base, so that plain transformers can read it."""
    out = merged.with_name("whole")
    shutil.copytree(merged, out)
    add_tokenizer(out)
    return {"base": mini.base, "merged": out}


@pytest.mark.parametrize("which", ["base", "merged"])
def test_predictions_equal_plain_transformers(
    mini: MiniSuite, bench: Bench, loaded: dict[str, Path], merged: Path, which: str
) -> None:
    subject = Subject.base(mini.suite) if which == "base" else Subject.model(mini.suite, str(merged))
    found = bench.evaluate(subject)
    for task, result in found.tasks.items():
        expected = plain_predictions(mini, loaded[which], task)
        assert result.predictions == expected
        assert result.labels == mini.rows[task]["test"].labels
        assert result.score.value == result.metrics["accuracy"] == np.mean(np.equal(expected, result.labels))
    assert max(len(set(result.predictions)) for result in found.tasks.values()) > 1


def test_experts_are_better_than_the_base(mini: MiniSuite, bench: Bench) -> None:
    """What this suite is for."""
    base, experts = bench.evaluate(Subject.base(mini.suite)), bench.experts()
    for task in TASKS:
        assert experts.tasks[task].score.value > base.tasks[task].score.value + 0.05
        encoder = mini.expert(task)
        assert experts.tasks[task].predictions == plain_predictions(mini, encoder, task)


def test_the_row_of_the_experts(mini: MiniSuite, bench: Bench) -> None:
    found = bench.experts()
    for result in found.tasks.values():
        assert result.normalised is not None
        assert (result.normalised.value, result.normalised.low, result.normalised.high) == (1, 1, 1)
        assert result.expert == result.score.value
        assert result.head == "expert"
    assert found.normalised is not None
    assert (found.normalised.value, found.normalised.low, found.normalised.high) == (1, 1, 1)
    assert (found.protocol.task_id, found.model.label) == ("model", "experts")
    assert found.average.value == pytest.approx(np.mean([r.score.value for r in found.tasks.values()]))


def test_normalised_scores_and_averages_by_hand(mini: MiniSuite, bench: Bench) -> None:
    base, experts = bench.evaluate(Subject.base(mini.suite)), bench.experts()
    shares = []
    for task, result in base.tasks.items():
        expert = experts.tasks[task].score.value
        assert result.expert == expert
        assert result.normalised is not None
        shares.append(result.score.value / expert)
        assert result.normalised.value == pytest.approx(shares[-1])
        draws = [
            resampled(task, "accuracy", r.labels, r.predictions) for r in (result, experts.tasks[task])
        ]  # the same rows for both
        ratio = interval(shares[-1], draws[0] / draws[1])
        assert (result.normalised.low, result.normalised.high) == pytest.approx((ratio.low, ratio.high))
    assert base.normalised is not None
    assert base.normalised.value == pytest.approx(np.mean(shares))
    assert base.normalised.low < base.normalised.value < base.normalised.high
    assert base.average.value == pytest.approx(np.mean([r.score.value for r in base.tasks.values()]))
    means = np.mean([resampled(t, "accuracy", r.labels, r.predictions) for t, r in base.tasks.items()], axis=0)
    assert (base.average.low, base.average.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))


def test_an_expert_that_scores_nothing_normalises_nothing(
    mini: MiniSuite, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = bench.expert("tone")
    zero = result.model_copy(update={"score": interval(0.0, np.zeros(10))})
    whole = bench._experts["tone"]
    monkeypatch.setitem(bench._experts, "tone", whole.model_copy(update={"tasks": {"tone": zero}}))
    found = bench.evaluate(Subject.base(mini.suite))
    assert found.tasks["tone"].normalised is None
    assert found.tasks["pair"].normalised is not None
    assert found.normalised is None


def test_an_expert_is_run_once_without_the_cache(mini: MiniSuite, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    run = Bench._run

    def counted(self: Bench, subject: Subject, *rest: Any) -> Any:
        runs.append(subject.label)
        return run(self, subject, *rest)

    monkeypatch.setattr(Bench, "_run", counted)
    bench = Bench(mini.suite, Options(use_cache=False))
    bench.experts()
    bench.evaluate(Subject.base(mini.suite))
    assert sorted(runs) == sorted(["base + heads", *(f"expert {task}" for task in mini.suite.tasks)])


def test_the_order_of_tasks_changes_no_task(mini: MiniSuite, bench: Bench) -> None:
    data = yaml.safe_load((mini.root / "suite.yaml").read_text())
    data["tasks"] = dict(reversed(data["tasks"].items()))
    turned = Bench(suite_of(data, mini.root)).evaluate(Subject.base(mini.suite))
    found = bench.evaluate(Subject.base(mini.suite))
    assert list(turned.tasks) == TASKS[::-1]
    for task in TASKS:
        assert turned.tasks[task] == found.tasks[task]


def test_some_tasks_only(mini: MiniSuite, bench: Bench, merged: Path) -> None:
    found = evaluate(merged, mini.suite, tasks=["pair", "tone"])
    assert list(found.tasks) == found.suite.tasks == ["tone", "pair"]
    whole = bench.evaluate(Subject.model(mini.suite, str(merged)))
    assert found.tasks["pair"] == whole.tasks["pair"]
    with pytest.raises(RecipeError, match=r"mini: the suite has no task 'pare'; did you mean 'pair'\?"):
        evaluate(merged, mini.suite, tasks=["pare"])


@pytest.fixture
def collated(monkeypatch: pytest.MonkeyPatch) -> list[list[Sample]]:
    """Every batch that models are given."""
    found: list[list[Sample]] = []
    collate = Net.collate

    def spy(net: Net, samples: Sequence[Sample]) -> Any:
        if samples[0].task:  # not the blank one
            found.append(list(samples))
        return collate(net, samples)

    monkeypatch.setattr(Net, "collate", spy)
    return found


def test_batches_mix_the_tasks(mini: MiniSuite, own_cache: Path, collated: list[list[Sample]]) -> None:
    bench = Bench(mini.suite, Options(batch_size=16, use_cache=False))
    bench._assemble(Subject.base(mini.suite), TASKS, {})
    assert [len(batch) for batch in collated] == [16] * 11 + [4]
    assert sum(len({sample.task for sample in batch}) == 3 for batch in collated) >= 11
    seen = sorted(str(sample.value) for batch in collated for sample in batch)
    assert seen == sorted(str(value) for task in TASKS for value in mini.rows[task]["test"].inputs)


def test_the_size_of_batches_changes_no_answer(mini: MiniSuite, bench: Bench) -> None:
    found = bench.evaluate(Subject.base(mini.suite))
    small = Bench(mini.suite, Options(batch_size=7))._assemble(Subject.base(mini.suite), TASKS, {})
    assert small.protocol.batch_size == 7
    for task in TASKS:
        assert small.tasks[task].predictions == found.tasks[task].predictions


def test_lower_precision(mini: MiniSuite, bench: Bench) -> None:
    found = bench.evaluate(Subject.base(mini.suite))
    half = Bench(mini.suite, Options(dtype="bfloat16"))._assemble(Subject.base(mini.suite), TASKS, {})
    assert half.protocol.dtype == "bfloat16"
    same = [np.mean(np.equal(half.tasks[t].predictions, found.tasks[t].predictions)) for t in TASKS]
    assert np.mean(same) > 0.9


@pytest.mark.parametrize(("device", "message"), [("gpu9", "is no device that torch knows; use cpu"), ("cuda", "CUDA")])
def test_devices_that_are_not_there(mini: MiniSuite, device: str, message: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(MachineError, match=f"--device {device}: .*{message}"):
        Bench(mini.suite, Options(device=device)).experts()


def test_an_overlap_is_found_before_anything_is_measured(mini: MiniSuite, tmp_path: Path) -> None:
    path = mini.copy(tmp_path)
    shutil.copy(tmp_path / "data" / "count-test.csv", tmp_path / "data" / "count-adapt.csv")
    with pytest.raises(CheckpointError, match=r"data/count-adapt\.csv: 60 of its 60 inputs are also in count's test"):
        Bench(read_suite(path))


# ---------------------------------------------------------------- the cache

Change = Callable[[Path], Any]


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def scaled(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensors[name] * 1.01})


def edit(file: str, old: str, new: str) -> Change:
    def change(root: Path) -> None:
        text = (root / file).read_text()
        assert old in text
        (root / file).write_text(text.replace(old, new, 1))

    return change


CHANGES: dict[str, Change] = {
    "weights": lambda root: rewrite(root / "model/model.safetensors", scaled("embeddings.LayerNorm.weight")),
    "its own head": lambda root: rewrite(root / "model/heads/tone.safetensors", scaled("classifier.weight")),
    "a head of the suite": lambda root: rewrite(root / "heads/pair.safetensors", scaled("classifier.weight")),
    "a test input": edit("data/count-test.csv", "w", "w1 w"),
    "a test input's case": edit("data/count-test.csv", "w", "W"),
    "a label": lambda root: flip_label(root / "data/count-test.csv"),
    "the tokenizer": edit("base/tokenizer.json", '"w91"', '"w9x"'),
    "class names": edit("suite.yaml", "- few", "- little"),
    "metrics": edit("suite.yaml", "  tone:\n", "  tone:\n    metrics: [accuracy, f1_macro]\n"),
    "max_length": edit("suite.yaml", "max_length: 16", "max_length: 12"),
}  # fmt: skip


def flip_label(path: Path) -> None:
    lines = path.read_text().splitlines()
    lines[1] = lines[1][:-1] + str(1 - int(lines[1][-1]))
    path.write_text("\n".join(lines) + "\n")


def test_what_is_measured_again(
    mini: MiniSuite, merged: Path, tmp_path: Path, own_cache: Path, collated: list[list[Sample]]
) -> None:
    path = mini.copy(tmp_path / "suite")
    shutil.copytree(merged, tmp_path / "suite" / "model")
    data = yaml.safe_load(path.read_text())
    for task in data["tasks"].values():
        task["data"] = {"test": task["data"]["test"]}
    path.write_text(yaml.safe_dump(data, sort_keys=False))

    def runs(**options: Any) -> int:
        collated.clear()
        suite = read_suite(path)
        bench = Bench(suite, Options(batch_size=64, **options))
        bench._assemble(Subject.model(suite, str(tmp_path / "suite" / "model"), "mine"), TASKS, {})
        return len(collated)

    full = -(-3 * TEST // 64)
    assert runs() == full
    assert runs() == 0, "nothing changed"
    for what, change in CHANGES.items():
        change(tmp_path / "suite")
        assert runs() == full, what
        assert runs() == 0, what
    assert runs(dtype="bfloat16") == full
    assert runs() == 0
    assert runs(use_cache=False) == full
    (tmp_path / "suite" / "model" / "README.md").write_text("changed")
    (tmp_path / "suite" / "model").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path / "suite" / "model")
    assert runs() == 0, "notes and places are nothing"
    for path_ in own_cache.rglob("evaluations/**/*.json"):
        path_.write_text(path_.read_text()[:100])
    assert runs() == full, "what was cut off is measured again"


def test_what_comes_from_the_cache_is_the_same(mini: MiniSuite, merged: Path, own_cache: Path) -> None:
    first = Bench(mini.suite).evaluate(Subject.model(mini.suite, str(merged), "one"))
    second = Bench(mini.suite).evaluate(Subject.model(mini.suite, str(merged), "two"))
    assert second.model.label == "two", "but for its label"
    assert second.model_copy(update={"model": first.model}) == first
    assert not list(own_cache.rglob(".*.json-*")), "no scratch files"


# ---------------------------------------------------------------- latency


def test_the_model_alone_is_timed(mini: MiniSuite, bench: Bench, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, collate, now = Net.scores, Net.collate, [0.0]

    def takes(seconds: float, result: Any) -> Any:
        now[0] += seconds
        return result

    with monkeypatch.context() as patch:
        patch.setattr("plait.evaluate.clock.time.perf_counter", lambda: now[0])
        patch.setattr(Net, "scores", lambda net, batch: takes(0.05, scores(net, batch)))
        patch.setattr(Net, "collate", lambda net, samples: takes(0.3, collate(net, samples)))
        subject = Subject.model(mini.suite, str(merged))
        found = Bench(mini.suite, Options(batch_size=10, use_cache=False)).evaluate(subject)
    assert found.latency == pytest.approx(0.005), "0.05 s for ten samples; making batches of them is left out"
    assert bench.experts().latency is not None


def test_the_latency_is_the_median_of_the_largest_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 9.0, 10.0, 10.4, 10.5, 10.7, 20.0, 20.8, 30.0, 30.1])
    monkeypatch.setattr("plait.evaluate.clock.time.perf_counter", lambda: next(now))
    clock = Clock(torch.device("cpu"))
    for spans, samples in ((1, 4), (2, 4), (1, 4), (1, 1)):  # the first is slow, the last has one sample
        for _ in range(spans):
            with clock.running():
                pass
        clock.lap(samples)
    assert clock.latency() == pytest.approx(0.8 / 4)


def test_what_was_filed_without_a_latency_is_measured_again(mini: MiniSuite, merged: Path, own_cache: Path) -> None:
    subject = Subject.model(mini.suite, str(merged))
    before = Bench(mini.suite).evaluate(subject)
    for file in (own_cache / "evaluations").rglob("*.json"):
        found = load(file)
        assert isinstance(found, Evaluation)
        file.write_text(dump(found.model_copy(update={"latency": None})))
    after = Bench(mini.suite).evaluate(subject)
    assert after.latency is not None
    assert after.tasks == before.tasks


# ---------------------------------------------------------------- heads


def test_whose_head_is_used(mini: MiniSuite, bench: Bench, merged: Path) -> None:
    found = bench.evaluate(Subject.model(mini.suite, str(merged)))
    assert {task: r.head for task, r in found.tasks.items()} == {"tone": "model", "count": "model", "pair": "suite"}
    base = bench.evaluate(Subject.base(mini.suite))
    assert {r.head for r in base.tasks.values()} == {"suite"}


def test_the_models_own_heads_go_first(mini: MiniSuite, merged: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(merged, model)
    constant = {"classifier.weight": torch.zeros(4, pico.WIDTH), "classifier.bias": torch.eye(4)[2]}
    save_file(constant, model / "heads" / "pair.safetensors")
    found = evaluate(model, mini.suite, tasks=["pair"]).tasks["pair"]
    assert (found.head, set(found.predictions)) == ("model", {2})


def changed(mini: MiniSuite, folder: Path, task: str, **entry: Any) -> Suite:
    """The suite, in a copy, with another task."""
    path = mini.copy(folder)
    data = yaml.safe_load(path.read_text())
    data["tasks"][task].update(entry)
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return read_suite(path).only([task])


def test_a_head_counts_its_classes_in_another_order(mini: MiniSuite, bench: Bench, tmp_path: Path) -> None:
    """The names in the head's file say which output is which."""
    order = [2, 0, 3, 1]
    suite = changed(mini, tmp_path, "pair", head="other.safetensors")
    tensors = {f"classifier.{name}": value[order].contiguous() for name, value in mini.head("pair").items()}
    names = json.dumps({str(place): CLASSES["pair"][index] for place, index in enumerate(order)})
    save_file(tensors, tmp_path / "other.safetensors", metadata={"id2label": names})
    found = evaluate(mini.base, suite).tasks["pair"]
    assert found.predictions == bench.evaluate(Subject.base(mini.suite)).tasks["pair"].predictions


def test_heads_that_do_not_fit(mini: MiniSuite, tmp_path: Path) -> None:
    suite = changed(mini, tmp_path, "pair", head="wrong.safetensors")
    save_file({"classifier.weight": torch.zeros(4, 31)}, tmp_path / "wrong.safetensors")
    with pytest.raises(CheckpointError, match=r"wrong\.safetensors: the head of pair reads 31 features, .* gives 32"):
        evaluate(mini.base, suite)
    save_file({"classifier.weight": torch.zeros(3, 32)}, tmp_path / "wrong.safetensors")
    with pytest.raises(
        CheckpointError, match=r"the head of pair has 3 outputs, but the task has 4 classes; check head: and classes:"
    ):
        evaluate(mini.base, suite)
    (tmp_path / "wrong.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"suite\.yaml, line \d+: tasks\.pair\.head: no such file: .*wrong\.safe"):
        evaluate(mini.base, suite)


def test_an_expert_without_a_head(mini: MiniSuite, tmp_path: Path) -> None:
    suite = changed(mini, tmp_path, "tone")
    (tmp_path / "experts" / "tone" / "head.safetensors").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"line \d+: tasks\.tone: the expert experts/tone brings no head of its own; .* head:",
    ):
        evaluate(mini.base, suite)


def test_labels_that_the_head_does_not_know(mini: MiniSuite, tmp_path: Path) -> None:
    path = mini.copy(tmp_path)
    data = yaml.safe_load(path.read_text())
    del data["tasks"]["count"]["classes"]
    suite = suite_of(data, tmp_path).only(["count"])
    file = tmp_path / "data" / "count-test.csv"
    text = file.read_text()
    assert evaluate(mini.base, suite).tasks["count"].samples == TEST
    file.write_text(text + "w50 w51 w50 w52,2\n")
    with pytest.raises(CheckpointError, match=r"count-test\.csv: row 60 has label 2, but count has 2 outputs, counted"):
        evaluate(mini.base, suite)


def test_metrics_that_do_not_fit_the_model(mini: MiniSuite, tmp_path: Path) -> None:
    for number, (task, entry, message) in enumerate(
        [
            ("tone", {"metrics": ["f1"]}, r"tasks\.tone\.metrics: f1 is of class 1 of two, .* 3 classes; use f1_macro"),
            ("tone", {"metrics": ["exact_match"]}, r"tasks\.tone\.metrics: exact_match is for models that answer in"),
        ]
    ):
        with pytest.raises(RecipeError, match=rf"suite\.yaml, line \d+: {message}"):
            evaluate(mini.base, changed(mini, tmp_path / str(number), task, **entry))


def test_several_metrics_and_the_first_is_the_score(mini: MiniSuite, bench: Bench, tmp_path: Path) -> None:
    suite = changed(mini, tmp_path, "count", metrics=["matthews", "f1", "accuracy"])
    result = evaluate(mini.base, suite).tasks["count"]
    for metric in ("matthews", "f1", "accuracy"):
        assert result.metrics[metric] == pytest.approx(PLAIN[metric](result.labels, result.predictions))
    assert (result.metric, result.score.value) == ("matthews", result.metrics["matthews"])
    assert result.predictions == bench.evaluate(Subject.base(mini.suite)).tasks["count"].predictions


# ---------------------------------------------------------------- models that are not there, or not whole


def test_models_that_cannot_be_read(mini: MiniSuite, merged: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\./gone: no such file or folder"):
        evaluate("./gone", mini.suite)
    shutil.copytree(merged, tmp_path / "hole")
    rewrite(tmp_path / "hole" / "model.safetensors", lambda t: t.pop("encoder.layer.1.output.dense.bias"))
    with pytest.raises(CheckpointError, match=r"hole: lacks 'encoder\.layer\.1\.output\.dense\.bias', which BertModel"):
        evaluate(tmp_path / "hole", mini.suite)


# ---------------------------------------------------------------- adapters


def test_an_adapter_expert_is_what_peft_makes_of_it(mini: MiniSuite, tmp_path: Path) -> None:
    suite = changed(mini, tmp_path, "tone", expert="adapter", head="experts/tone/head.safetensors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["query", "value", "dense"])
        model = peft.get_peft_model(transformers.AutoModel.from_pretrained(mini.base), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.2 * torch.randn_like(parameter)
    model.save_pretrained(str(tmp_path / "adapter"))
    rows = mini.rows["tone"]["test"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(mini.base)
    found = []
    with torch.inference_mode():
        for text in rows.inputs:
            encoded = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
            found.append(model.eval()(**encoded).last_hidden_state[0].mean(dim=0))
    head = mini.head("tone")
    expected = (torch.stack(found) @ head["weight"].T + head["bias"]).argmax(dim=1).tolist()
    bench = Bench(suite)
    assert bench.expert("tone").predictions == expected
    assert expected != bench.evaluate(Subject.base(suite)).tasks["tone"].predictions
    # The same adapter, measured as a model of the suite.
    assert evaluate(tmp_path / "adapter", suite).tasks["tone"].predictions == expected


# ---------------------------------------------------------------- regression


@pytest.fixture(scope="module")
def regression(mini: MiniSuite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """How much: a number for a text. The head is fitted to the expert's features."""
    root = tmp_path_factory.mktemp("regression")
    rows = mini.rows["tone"]
    for split in ("train", "test"):
        noise = np.random.default_rng(0).normal(size=len(rows[split].labels)) * 0.3
        table = {"text": rows[split].inputs, "label": (np.array(rows[split].labels) + noise).tolist()}
        datasets.Dataset.from_dict(table).to_parquet(root / f"{split}.parquet")
        if split == "train":
            x = features(mini.expert("tone"), rows[split].inputs).double()
            y = torch.tensor(table["label"]).unsqueeze(1) - 1
            found = torch.linalg.solve(x.T @ x + 0.01 * torch.eye(pico.WIDTH), x.T @ y.double()).float().T
            save_file({"score.weight": found.contiguous(), "score.bias": torch.ones(1)}, root / "head.safetensors")
    return root


def regression_suite(mini: MiniSuite, root: Path, *names: str) -> Suite:
    task = {
        "expert": str(mini.expert("tone")), "head": "head.safetensors", "metrics": list(names),
        "data": {"test": "test.parquet"},
    }  # fmt: skip
    return suite_of({"base": str(mini.base), "pooling": "mean", "max_length": 16, "tasks": {"much": task}}, root)


def test_regression(mini: MiniSuite, regression: Path) -> None:
    suite = regression_suite(mini, regression, "pearson", "spearman")
    result = Bench(suite).expert("much")
    head = load_file(regression / "head.safetensors")
    plain = features(mini.expert("tone"), mini.rows["tone"]["test"].inputs) @ head["score.weight"][0] + 1
    assert result.predictions == pytest.approx(plain.tolist(), abs=1e-5)
    assert result.metrics == pytest.approx(
        {"pearson": PLAIN["pearson"](result.labels, plain),
         "spearman": PLAIN["spearman"](result.labels, plain)}, abs=1e-4,
    )  # fmt: skip
    assert result.score.value > 0.3


def test_a_number_has_no_accuracy(mini: MiniSuite, regression: Path) -> None:
    with pytest.raises(RecipeError, match=r"tasks\.much\.metrics: the head gives one number, which accuracy cannot"):
        Bench(regression_suite(mini, regression, "accuracy")).expert("much")


# ---------------------------------------------------------------- models that answer in text


ANSWERED = ["w1", "w2 w3", "w4"]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with two tasks: one of given answers, one answered freely."""
    root = tmp_path_factory.mktemp("spoken")
    pico.make_llama(root / "base")
    add_tokenizer(root / "base", pad=False)
    rewrite(root / "base" / "model.safetensors", lambda t: t.update({n: v * 40 for n, v in t.items() if v.dim() > 1}))
    pico.experts(root, root / "base", 2, scale=0.5)
    for expert in ("expert0", "expert1"):
        shutil.copy(root / "base" / "tokenizer.json", root / expert)
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, 4)) for _ in range(12)]
    contexts = [" ".join(random.choice(WORDS, 2)) for _ in range(12)]
    labels = [row % 3 for row in range(12)]
    table = {"text": texts, "context": contexts, "label": labels}
    datasets.Dataset.from_dict(table).to_parquet(root / "choice.parquet")
    free = [plain_greedy(root / "expert1", f"{c} : {t} =") if row % 2 else "w1"
            for row, (t, c) in enumerate(zip(texts, contexts, strict=True))]  # fmt: skip
    datasets.Dataset.from_dict({**table, "label": free}).to_parquet(root / "free.parquet")
    return root


def spoken_suite(root: Path, *names: str, **changes: Any) -> Suite:
    both = {"path": "choice.parquet", "input": ["text", "context"]}
    tasks = {
        "choice": {"expert": "expert0", "answers": ANSWERED, "prompt": "{context} : {text} =",
                   "data": {"test": both}},
        "free": {"expert": "expert1", "metrics": ["exact_match"], "prompt": "{context} : {text} =",
                 "data": {"test": {**both, "path": "free.parquet"}}},
    }  # fmt: skip
    chosen = {name: {**tasks[name], **changes} for name in names or tasks}
    return suite_of({"base": "base", "max_length": 32, "tasks": chosen}, root)


@torch.inference_mode()
def plain_choice(folder: Path, prompt: str, answers: Sequence[str]) -> int:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    asked = tokenizer(prompt)["input_ids"]
    found = []
    for answer in answers:
        ids = torch.tensor(tokenizer(f"{prompt} {answer}")["input_ids"])
        logp = model(ids.unsqueeze(0)).logits[0].log_softmax(-1)
        found.append(float(sum(logp[at - 1, ids[at]] for at in range(len(asked), len(ids)))))
    return int(np.argmax(found))


@torch.inference_mode()
def plain_greedy(folder: Path, prompt: str) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def prompts(root: Path) -> list[str]:
    table = datasets.Dataset.from_parquet(str(root / "choice.parquet"))
    assert isinstance(table, datasets.Dataset)
    return [f"{c} : {t} =" for c, t in zip(table["context"], table["text"], strict=True)]


def test_answers_by_likelihood_and_by_writing(spoken: Path, collated: list[list[Sample]]) -> None:
    suite = spoken_suite(spoken)
    found = Bench(suite, Options(batch_size=5)).experts()
    choice, free = found.tasks["choice"], found.tasks["free"]
    assert choice.predictions == [plain_choice(spoken / "expert0", p, ANSWERED) for p in prompts(spoken)]
    assert free.predictions == [plain_greedy(spoken / "expert1", p) for p in prompts(spoken)]
    assert (free.metric, free.head, choice.head) == ("exact_match", "none", "none")
    assert free.score.value >= 0.5
    assert len(set(choice.predictions)) > 1
    assert len(set(free.predictions)) > 1


def test_both_kinds_in_one_batch(spoken: Path) -> None:
    suite = spoken_suite(spoken)
    found = Bench(suite, Options(batch_size=6)).evaluate(Subject.base(suite))
    assert found.tasks["choice"].predictions == [plain_choice(spoken / "base", p, ANSWERED) for p in prompts(spoken)]
    assert found.tasks["free"].predictions == [plain_greedy(spoken / "base", p) for p in prompts(spoken)]
    assert found.tasks["free"].labels[0] == "w1"


def test_class_names_are_answers(spoken: Path) -> None:
    named = spoken_suite(spoken, "choice", answers=None, classes=ANSWERED)
    given = spoken_suite(spoken, "choice")
    assert Bench(named).expert("choice").predictions == Bench(given).expert("choice").predictions


def test_without_a_prompt_the_text_is_it(spoken: Path) -> None:
    plain = spoken_suite(spoken, "choice", prompt=None)
    text = spoken_suite(spoken, "choice", prompt="{text}")
    assert Bench(plain).expert("choice").predictions == Bench(text).expert("choice").predictions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "{question}"}, r"tasks\.choice\.prompt: names 'question', .* write \{text\}, \{context\}, or add"),
        ({"prompt": "{} = {}"}, r"tasks\.choice\.prompt: is no template \(.*index 0"),
        ({"prompt": "{text"}, r"tasks\.choice\.prompt: is no template \(.*\); columns stand in braces by name"),
        ({"prompt": "{text.nothing}"}, r"tasks\.choice\.prompt: is no template"),
        ({"answers": None}, r"tasks\.choice: a model that answers in text needs the possible answers; add answers:"),
        ({"answers": ["w1", " ", "w2"]}, r"the answer ' ' has no tokens of its own"),
        ({"metrics": ["f1"]}, r"tasks\.choice\.metrics: f1 is of class 1 of two, and the task has 3 classes"),
    ],
)
def test_questions_that_cannot_be_asked(spoken: Path, changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises((RecipeError, CheckpointError), match=message):
        Bench(spoken_suite(spoken, "choice", **changes)).expert("choice")


def test_labels_without_answers(spoken: Path) -> None:
    with pytest.raises(CheckpointError, match=r"choice\.parquet: row 2 has label 2, but choice has 2 outputs"):
        Bench(spoken_suite(spoken, "choice", answers=["w1", "w2"])).expert("choice")


# ---------------------------------------------------------------- results as files


def test_results_come_back_as_they_were(bench: Bench, tmp_path: Path) -> None:
    found = bench.experts()
    (tmp_path / "x.json").write_text(dump(found))
    again = load(tmp_path / "x.json")
    assert isinstance(again, Evaluation)
    assert again == found
    assert next(iter(json.loads(dump(found)).items())) == ("schema", "plait.evaluation/1")
    assert dump(again) == dump(found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"x\.json: is not JSON; give a file that plait eval, compare or sweep wrote"),
        ("", r"x\.json: is not JSON"),
        ("[]", r"x\.json: has no schema of ours \(plait\.evaluation/1, .*\); give a file that plait eval"),
        ('{"schema": "plait.evaluation/9"}', r"x\.json: has no schema of ours"),
        ('{"schema": ["plait.evaluation/1"]}', r"x\.json: has no schema of ours"),
        ('{"schema": "plait.sweep/1"}', r"x\.json: suite: Field required"),
        ("\xff", r"x\.json: "),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "x.json")


def test_results_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.json: cannot be read: No such file"):
        load(tmp_path / "gone.json")


def test_a_schema_is_strict(bench: Bench, tmp_path: Path) -> None:
    data = json.loads(dump(bench.experts()))
    (tmp_path / "x.json").write_text(json.dumps({**data, "extra": 1}))
    with pytest.raises(CheckpointError, match=r"x\.json: extra: Extra inputs are not permitted"):
        load(tmp_path / "x.json")
