"""What an evaluation, a comparison and a sweep have found: the one schema in which results are stored and read.

Scores are fractions (0.873, not 87.3). Every JSON file names its schema in its first key.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from plait.errors import CheckpointError


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Interval(_Data):
    """A value and its 95 % interval by bootstrap over samples."""

    value: float
    low: float
    high: float


class ModelFacts(_Data):
    """Which model was measured."""

    label: str
    path: str | None
    fingerprint: str
    """Over the content of its config and weights."""
    parameters: int
    bytes: int
    """Size of its weight files."""


class SuiteFacts(_Data):
    """On what it was measured."""

    name: str
    tasks: list[str]
    fingerprint: str
    """Over every task's test inputs and labels."""


class Corruption(_Data):
    """What the test images went through before they were measured."""

    name: str
    severity: int
    """From 1 to 5."""


class Protocol(_Data):
    """How it was measured: whatever may change a number."""

    batch_size: int
    dtype: str
    device: str
    mixed_batches: bool = True
    """Batches mix the samples of all tasks."""
    task_id: Literal["head", "model"] = "head"
    """What is chosen by a sample's task: only its head, or the whole model (experts)."""
    seed: int = 0
    corruption: Corruption | None = None
    """None: the test inputs as they are."""


class TaskResult(_Data):
    """One model on one task's test split."""

    metric: str
    """The task's main metric."""
    score: Interval
    metrics: dict[str, float]
    """All metrics of the task, the main one among them."""
    expert: float | None
    """The main metric of this task's own expert, on the inputs as they are."""
    normalised: Interval | None
    """score / expert. None where the expert's score is unknown or not above zero."""
    samples: int
    head: Literal["model", "suite", "expert", "none"]
    """Whose head was used: the measured folder's own, the suite's, the expert's; none for answers in text."""
    predictions: list[Any]
    """Class index, number or text for every test sample, in the split's order."""
    labels: list[Any]


class Routing(_Data):
    """How a routed model mixed its experts for the samples of every task."""

    experts: list[str]
    routes: list[str]
    """Groups of layers with weights of their own, from first to last; one where the whole model has one mixture."""
    weights: dict[str, list[list[float]]]
    """Task → per route the mean weight of every expert."""
    chosen: dict[str, list[int]]
    """Task → how many samples had each expert as their heaviest, by the mean over the routes."""
    right: dict[str, float]
    """Task → share of its samples whose heaviest expert is its own."""
    blind: dict[str, float]
    """Task → accuracy where the head, too, is the heaviest expert's: nothing is told the task."""

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Routing:
        shape = [len(self.experts)] * len(self.routes)
        if any([len(row) for row in rows] != shape for rows in self.weights.values()):
            raise ValueError("weights must have a number for every route and expert")
        if any(len(counts) != len(self.experts) for counts in self.chosen.values()):
            raise ValueError("chosen must have a number for every expert")
        if set(self.chosen) != set(self.weights):
            raise ValueError("chosen must have the tasks of weights, and no others")
        if not set(self.blind) <= set(self.right) <= set(self.weights) & set(self.experts):
            raise ValueError("right and blind must have tasks of weights that have an expert, and no others")
        return self

    @property
    def right_mean(self) -> float | None:
        """Mean of `right` over its tasks; None where no task has an expert in the model."""
        return sum(self.right.values()) / len(self.right) if self.right else None

    @property
    def blind_mean(self) -> float | None:
        """Mean of `blind` over its tasks; None where it is known for none."""
        return sum(self.blind.values()) / len(self.blind) if self.blind else None


class Part(_Data):
    """Averages over some of the tasks."""

    tasks: list[str]
    average: Interval
    normalised: Interval | None


class Evaluation(_Data):
    """One model on the tasks of a suite."""

    schema_: Literal["plait.evaluation/1"] = Field(default="plait.evaluation/1", alias="schema")
    model: ModelFacts
    suite: SuiteFacts
    protocol: Protocol
    tasks: dict[str, TaskResult]
    average: Interval
    """Mean of the tasks' scores."""
    normalised: Interval | None
    """Mean of the tasks' normalised scores."""
    seen: Part | None = None
    """The tasks whose experts were merged, where others are said to be unseen."""
    unseen: Part | None = None
    """The tasks that the model was merged without."""
    routing: Routing | None = None
    """For models that are routed by their input."""
    seconds: float
    samples_per_second: float
    latency: float | None = None
    """Seconds of the model alone for a sample, in batches of `protocol.batch_size`: the median over batches."""
    versions: dict[str, str]


class Corrupted(_Data):
    """One model under one corruption."""

    evaluation: Evaluation
    """Normalised by the experts on the inputs as they are, so that a corruption shows what it costs."""
    experts: dict[str, float]
    """Task → the main metric of its own expert under the same corruption."""
    normalised_alike: Interval | None
    """Mean of score / expert's score where both were corrupted: whether the model bears it worse than experts do."""


class Robustness(_Data):
    """One model on clean inputs and under corruptions of them."""

    schema_: Literal["plait.robustness/1"] = Field(default="plait.robustness/1", alias="schema")
    clean: Evaluation
    corrupted: list[Corrupted]


class Difference(_Data):
    """A row's average minus the baseline's, paired by sample."""

    value: float
    low: float
    high: float
    p: float
    """Two-sided, by randomly exchanging the two models' answers sample by sample."""


class Row(_Data):
    """One line of a comparison."""

    label: str
    kind: Literal["expert", "base", "merge", "model"]
    method: str | None
    recipe: dict[str, Any] | None
    """The recipe that was merged, in canonical form."""
    evaluation: Evaluation
    merge_seconds: float | None
    """Without the fit, where there is one."""
    fit_seconds: float | None = None
    learned: dict[str, Any] | None = None
    """What was learned: {method, tasks, fit, data, summary, history, coefficients, masks}."""
    data: str
    """What data the method saw: `none`, `unlabeled inputs`, …"""
    difference: Difference | None
    """Against the comparison's baseline; None for the baseline itself and where there is nothing to pair."""
    corrupted: list[Corrupted] = []
    """The same model under corruptions, where the comparison measures them."""


class Comparison(_Data):
    """Several models on one suite."""

    schema_: Literal["plait.comparison/1"] = Field(default="plait.comparison/1", alias="schema")
    suite: SuiteFacts
    baseline: str
    """Label of the row that the others are tested against."""
    rows: list[Row]
    inspection: dict[str, Any] | None
    """What `plait inspect` says of the experts (norms, cosines, agreement of signs; overall, by group, by tensor)."""
    machine: str


class Point(_Data):
    """One merge of a sweep."""

    settings: dict[str, Any]
    """Recipe path → value, such as {"parameters.weight": 0.3}."""
    experts: list[str]
    """Tasks whose experts were merged; the others are unseen."""
    seen: Interval
    """Average normalised score over the merged tasks."""
    unseen: Interval | None
    """The same over the others, where the sweep measures them."""
    scores: dict[str, float]
    """Task → main metric."""
    normalised: dict[str, float]
    seconds: float


class Sweep(_Data):
    """A recipe over a grid of settings, or over subsets of the experts."""

    schema_: Literal["plait.sweep/1"] = Field(default="plait.sweep/1", alias="schema")
    suite: SuiteFacts
    method: str
    recipe: dict[str, Any]
    axes: dict[str, list[Any]]
    """Recipe path (or `experts`) → its values."""
    points: list[Point]


Result = Evaluation | Robustness | Comparison | Sweep
_KINDS: dict[str, type[Result]] = {
    "plait.evaluation/1": Evaluation, "plait.robustness/1": Robustness, "plait.comparison/1": Comparison,
    "plait.sweep/1": Sweep,
}  # fmt: skip


_MOST_BYTES = 256 << 20
"""Of a results file; every answer is in it, so that 40 models on a hundred thousand samples take about a tenth."""


def dump(result: Result) -> str:
    """JSON text of a result."""
    return result.model_dump_json(by_alias=True, indent=1) + "\n"


def load(path: str | os.PathLike[str]) -> Result:
    """Read a result file. Raises CheckpointError when it is not one."""
    import json

    place = Path(path)
    try:
        found = place.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_BYTES:
            raise CheckpointError(f"{path}: is no file of results (not a regular file, or over {_MOST_BYTES >> 20} MB)")
        data = json.loads(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: is not JSON; give a file that plait eval, compare or sweep wrote") from None
    kind = _KINDS.get(str(data.get("schema"))) if isinstance(data, dict) else None
    if kind is None:
        raise CheckpointError(
            f"{path}: has no schema of ours ({', '.join(_KINDS)}); give a file that plait eval, compare or sweep wrote"
        )
    try:
        return kind.model_validate(data)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
