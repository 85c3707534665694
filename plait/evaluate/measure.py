"""One model on a suite: `evaluate`. Batches mix the tasks; what was measured before is not measured again."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from plait import digests
from plait.errors import CheckpointError, RecipeError
from plait.evaluate import cache
from plait.evaluate.clock import Clock
from plait.evaluate.corrupt import corrupt
from plait.evaluate.metrics import interval, measure, resampled
from plait.evaluate.results import (
    Corrupted,
    Corruption,
    Evaluation,
    Interval,
    ModelFacts,
    Part,
    Protocol,
    SuiteFacts,
    TaskResult,
)  # fmt: skip
from plait.evaluate.routed import Record
from plait.evaluate.subjects import Options, Subject
from plait.evaluate.unseen import check_unseen, refuse_merged
from plait.models.answers import AnswerNet
from plait.models.net import Net, Sample
from plait.models.outfit import question
from plait.stages import Silent
from plait.suites.data import Split, check_disjoint, load_split
from plait.suites.definition import Suite


class Bench:
    """A suite with its test splits read and checked, ready to measure any number of models."""

    def __init__(self, suite: Suite, options: Options | None = None, *, unseen: Sequence[str] = ()) -> None:
        self.suite = suite
        self.unseen = check_unseen(suite, unseen)
        self.options = options or Options()
        self.progress = self.options.progress or Silent()
        self.splits: dict[str, Split] = {}
        for task, entry in suite.tasks.items():
            splits = {name: load_split(suite, task, name) for name in entry.data if name != "train"}
            check_disjoint(task, splits)
            self.splits[task] = splits["test"]
        self.corruption: Corruption | None = None
        self._clean = self
        self._experts: dict[str, Evaluation] = {}

    def under(self, corruption: Corruption) -> Bench:
        """The same splits under a corruption; scores are still normalised by the experts on the splits as they are."""
        for task, split in self.splits.items():
            if not split.is_image:
                raise RecipeError(
                    f"--corrupt {corruption.name}: the inputs of {task} are texts, and corruptions are for images; "
                    "leave --corrupt out, or choose tasks of images with --task"
                )
        other = copy.copy(self)
        other.corruption, other._clean, other._experts = corruption, self, {}
        return other

    @property
    def seen(self) -> Suite:
        """The suite without the tasks that are unseen: what may be merged and learned from."""
        return self.suite.only([task for task in self.suite.tasks if task not in self.unseen])

    def facts(self, tasks: list[str] | None = None) -> SuiteFacts:
        """The suite in a result."""
        names = tasks or list(self.suite.tasks)
        prints = {task: self.splits[task].fingerprint() for task in names}
        return SuiteFacts(name=self.suite.name, tasks=names, fingerprint=digests.digest(prints))

    def classes(self, task: str) -> list[str] | None:
        """Class names of a task."""
        return self.splits[task].classes

    def evaluate(self, subject: Subject, *, tasks: list[str] | None = None) -> Evaluation:
        """Measure a model on some tasks (default: all), with its tasks' experts as the yardstick."""
        names = list(self.suite.only(tasks).tasks)
        experts = {task: self._clean.expert(task) for task in names}
        return self._parted(self._assemble(subject, names, experts), experts)

    def experts(self) -> Evaluation:
        """Every task's own expert, as one evaluation: the upper bound."""
        results = {task: self.expert(task) for task in self.suite.tasks}
        parts = [self._experts[task] for task in self.suite.tasks]
        facts = ModelFacts(
            label="experts", path=None, fingerprint=digests.digest([part.model.fingerprint for part in parts]),
            parameters=sum(part.model.parameters for part in parts), bytes=sum(part.model.bytes for part in parts),
        )  # fmt: skip
        clean = {task: self._clean.expert(task) for task in results}
        own = {
            task: result.model_copy(update=_normalised(task, result, clean[task])) for task, result in results.items()
        }
        average, normalised = _averages(own, clean)
        seconds = sum(part.seconds for part in parts)
        found = Evaluation(
            model=facts, suite=self.facts(), protocol=self._protocol("model", of_expert=True), tasks=own,
            average=average, normalised=normalised, seconds=seconds, versions=_versions(),
            samples_per_second=sum(result.samples for result in own.values()) / seconds, latency=_shared_latency(parts),
        )  # fmt: skip
        return self._parted(found, clean)

    def beside_experts(self, found: Evaluation) -> Corrupted:
        """An evaluation of this bench, under its corruption, beside the experts under the same one."""
        experts = {task: self.expert(task) for task in found.tasks}
        alike = {task: r.model_copy(update=_normalised(task, r, experts[task])) for task, r in found.tasks.items()}
        return Corrupted(
            evaluation=found, experts={task: result.score.value for task, result in experts.items()},
            normalised_alike=_averages(alike, experts)[1],
        )  # fmt: skip

    def expert(self, task: str) -> TaskResult:
        """The task's own expert on its test split."""
        if task not in self._experts:
            self._experts[task] = self._assemble(Subject.expert(self.suite, task), [task], {})
        return self._experts[task].tasks[task]

    def ratio(self, task: str, result: TaskResult) -> np.ndarray:
        """Bootstrap draws of a task's normalised score."""
        return _ratio(task, result, self.expert(task))

    def _protocol(self, task_id: Literal["head", "model"], of_expert: bool = False) -> Protocol:
        options = self.options
        return Protocol(
            batch_size=options.batch_size, dtype=options.dtype, device=options.device, task_id=task_id,
            corruption=self.corruption, mixed_batches=options.mixed or of_expert,
        )  # fmt: skip

    def _parted(self, found: Evaluation, experts: Mapping[str, TaskResult]) -> Evaluation:
        """With averages over the seen and over the unseen tasks, where some are unseen."""
        parts: dict[str, Part] = {}
        for name, wanted in (("seen", False), ("unseen", True)):
            results = {task: result for task, result in found.tasks.items() if (task in self.unseen) == wanted}
            if self.unseen and results:
                average, normalised = _averages(results, experts)
                parts[name] = Part(tasks=list(results), average=average, normalised=normalised)
        return found.model_copy(update=parts)

    def _assemble(self, subject: Subject, tasks: list[str], experts: Mapping[str, TaskResult]) -> Evaluation:
        facts = self.facts(tasks)
        protocol = self._protocol(subject.task_id(tasks), subject.is_expert)
        way = protocol.model_dump(exclude_none=True)  # what is clean keeps the key it had before there were corruptions
        key = digests.digest([subject.fingerprint(tasks), facts.fingerprint, way, self.task_options(tasks)])
        found = cache.find(key) if self.options.use_cache else None
        if found is None or found.latency is None:  # filed by a version that did not time the model
            found = self._run(subject, tasks, facts, protocol)
            cache.store(key, found)
        results = {}
        for task in tasks:  # in the suite's order, which may not be that of the one who filed it
            result = found.tasks[task]
            expert = experts.get(task)
            update = {} if expert is None else _normalised(task, result, expert)
            results[task] = result.model_copy(update=update)
        average, normalised = _averages(results, experts)
        model = found.model.model_copy(update={"label": subject.label, "path": subject.path})
        return found.model_copy(
            update={"model": model, "suite": facts, "tasks": results, "average": average, "normalised": normalised}
        )

    def task_options(self, tasks: list[str]) -> Any:
        """What of the suite's definition, beyond the data, changes a score."""
        entries = {task: self.suite.tasks[task] for task in tasks}
        options = {task: [e.metrics, e.prompt, e.answers] for task, e in entries.items()}
        return [self.suite.max_length, self.suite.pooling, options]

    def _run(self, subject: Subject, tasks: list[str], facts: SuiteFacts, protocol: Protocol) -> Evaluation:
        net, heads = subject.load(tasks, {task: self.classes(task) for task in tasks}, self.options)
        for task in tasks:
            self._check_metrics(task, net)
        sizes = [len(self.splits[task]) for task in tasks]
        batches = _batches(sizes, protocol)
        record = Record.of(net, tasks)
        if record is not None:
            net.body.routing.context.average = not protocol.mixed_batches  # type: ignore[union-attr]
        answers: dict[str, list[Any]] = {task: [None] * len(self.splits[task]) for task in tasks}
        under = f" under {self.corruption.name}" if self.corruption else ""
        self.progress.stage(f"evaluate {subject.label}{under}", sum(sizes), "samples")
        start, clock = time.perf_counter(), Clock(net.device)
        for batch in batches:
            picked = [(tasks[which], int(row)) for which, row in batch]
            for task, row, answer in self._answer(net, picked, protocol, record, clock):
                answers[task][row] = answer
            clock.lap(len(picked))
            self.progress.advance(len(picked))
        seconds = time.perf_counter() - start
        results = {task: self._result(task, answers[task], heads.get(task, "none")) for task in tasks}
        average, _ = _averages(results, {})
        return Evaluation(
            model=subject.facts(net), suite=facts, protocol=protocol, tasks=results, average=average, normalised=None,
            routing=None if record is None else record.result(results),
            seconds=seconds, samples_per_second=sum(sizes) / seconds, latency=clock.latency(), versions=_versions(),
        )  # fmt: skip

    @torch.inference_mode()
    def _answer(
        self, net: Net, picked: list[tuple[str, int]], protocol: Protocol, record: Record | None, clock: Clock
    ) -> list[tuple[str, int, Any]]:
        samples = [Sample(task, self._input(net, task, row, protocol)) for task, row in picked]
        if isinstance(net, AnswerNet):
            told = [i for i, (task, _) in enumerate(picked) if self._generates(task)]
            with clock.running():
                written = net.generate([samples[i].value for i in told]) if told else []
            texts = dict(zip(told, written, strict=True))
            if told and record is not None:
                asked = [picked[i] for i in told]
                places = {task: [i for i, (name, _) in enumerate(asked) if name == task] for task, _ in asked}
                record.add(places, asked, fan=False)
            rest = [i for i in range(len(picked)) if i not in texts]
            found = [(*picked[i], text) for i, text in texts.items()]
            if not rest:
                return found
            return found + self._choose(net, [picked[i] for i in rest], [samples[i] for i in rest], record, clock)
        return self._choose(net, picked, samples, record, clock)

    def _input(self, net: Net, task: str, row: int, protocol: Protocol) -> Any:
        value, how = question(net, self.suite, task, self.splits[task], row), protocol.corruption
        if how is None:
            return value
        return corrupt(value, how.name, how.severity, seed=protocol.seed, task=task, row=row)

    def _choose(
        self, net: Net, picked: list[tuple[str, int]], samples: list[Sample], record: Record | None, clock: Clock
    ) -> list[tuple[str, int, Any]]:
        found, batch = [], net.collate(samples)
        with clock.running():
            answered = net.scores(batch)
        if record is not None:
            record.add({task: batch.read(rows) for task, rows in batch.rows.items()}, picked, fan=True)
        for task, scores in answered.items():
            rows = [row for name, row in picked if name == task]
            # A head with one output is a regression: its output is the answer.
            values = scores[:, 0] if scores.shape[1] == 1 else scores.argmax(dim=1)
            found += [(task, row, value) for row, value in zip(rows, values.tolist(), strict=True)]
        return found

    def _check_metrics(self, task: str, net: Net) -> None:
        """Refuse metrics that mean nothing for the answers of this model."""
        metrics, where = self.suite.tasks[task].metrics, self.suite.where("tasks", task, "metrics")
        if isinstance(net, AnswerNet):
            if self._generates(task):
                return
            outputs = len(net.answers[task])
        else:
            if self._generates(task):
                raise RecipeError(f"{where}: exact_match is for models that answer in text; use accuracy")
            outputs = net.heads[task].outputs
        single = [metric for metric in metrics if metric not in ("pearson", "spearman")]
        if outputs == 1 and single:
            raise RecipeError(f"{where}: the head gives one number, which {single[0]} cannot judge; use pearson")
        if outputs > 2 and "f1" in metrics:
            raise RecipeError(f"{where}: f1 is of class 1 of two, and the task has {outputs} classes; use f1_macro")
        labels = self.splits[task].labels()
        row = next((row for row, label in enumerate(labels) if label not in range(outputs)), None)
        if outputs > 1 and row is not None:
            raise CheckpointError(
                f"{self.splits[task].where}: row {row} has label {labels[row]}, but {task} has {outputs} outputs, "
                "counted from 0; check label: and head: of the suite"
            )

    def _generates(self, task: str) -> bool:
        return "exact_match" in self.suite.tasks[task].metrics

    def _result(self, task: str, answers: list[Any], head: Any) -> TaskResult:
        labels = self.splits[task].labels(as_text=self._generates(task))
        metrics = list(self.suite.tasks[task].metrics)
        values = {metric: measure(metric, labels, answers) for metric in metrics}
        score = interval(values[metrics[0]], resampled(task, metrics[0], labels, answers))
        return TaskResult(
            metric=metrics[0], score=score, metrics=values, expert=None, normalised=None, samples=len(labels),
            head=head, predictions=answers, labels=labels,
        )  # fmt: skip


def _batches(sizes: list[int], protocol: Protocol) -> list[np.ndarray]:
    """Batches of (task, row): of all tasks' rows in one random order, or of one task after another."""
    order, size = _mixed(sizes, protocol.seed), protocol.batch_size
    if protocol.mixed_batches:
        return [order[at : at + size] for at in range(0, len(order), size)]
    parts = [order[order[:, 0] == task] for task in range(len(sizes))]
    return [part[at : at + size] for part in parts for at in range(0, len(part), size)]


def _mixed(sizes: list[int], seed: int) -> np.ndarray:
    """[samples, 2] of (task, row): all tasks' rows in one random order, the same for every model."""
    pairs = np.array([(task, row) for task, size in enumerate(sizes) for row in range(size)])
    return np.random.default_rng(seed).permutation(pairs)


def _normalised(task: str, result: TaskResult, expert: TaskResult) -> dict[str, Any]:
    """Fields of a result that come from its expert; the interval resamples both on the same rows."""
    yardstick = expert.score.value
    if yardstick <= 0:
        return {"expert": yardstick, "normalised": None}
    ratio = interval(result.score.value / yardstick, _ratio(task, result, expert))
    return {"expert": yardstick, "normalised": ratio}


def _ratio(task: str, result: TaskResult, expert: TaskResult) -> np.ndarray:
    ours = resampled(task, result.metric, result.labels, result.predictions)
    theirs = resampled(task, expert.metric, expert.labels, expert.predictions)
    return ours / np.maximum(theirs, 1e-9)


def _averages(results: Mapping[str, TaskResult], experts: Mapping[str, TaskResult]) -> tuple[Interval, Interval | None]:
    draws = [resampled(task, r.metric, r.labels, r.predictions) for task, r in results.items()]
    average = interval(float(np.mean([r.score.value for r in results.values()])), np.mean(draws, axis=0))
    shares = {task: r.normalised.value for task, r in results.items() if r.normalised is not None}
    if len(shares) < len(results):
        return average, None
    ratios = [_ratio(task, r, experts[task]) for task, r in results.items()]
    return average, interval(float(np.mean(list(shares.values()))), np.mean(ratios, axis=0))


def _shared_latency(parts: Sequence[Evaluation]) -> float | None:
    """Of every task's own model: the mean over all samples."""
    counts = [sum(result.samples for result in part.tasks.values()) for part in parts]
    known = [part.latency for part in parts if part.latency is not None]
    if len(known) < len(parts):
        return None
    return sum(count * each for count, each in zip(counts, known, strict=True)) / sum(counts)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("plait", "torch", "transformers", "datasets", "scikit-learn", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def evaluate(
    model: str | Path, suite: Suite, *, tasks: list[str] | None = None, unseen: Sequence[str] = (),
    options: Options | None = None,
) -> Evaluation:  # fmt: skip
    """Measure a model (folder or hub id; full, or a LoRA adapter of the suite's base) on a suite.

    Tasks that are `unseen`, without whose experts it was merged, get averages of their own. Raises RecipeError for a
    suite that cannot be used, CheckpointError for files that do not fit.
    """
    suite = suite.only(tasks)
    bench, subject = Bench(suite, options, unseen=unseen), Subject.model(suite, str(model))
    refuse_merged(subject, bench.unseen)
    return bench.evaluate(subject)
