"""The field's metrics, as scikit-learn and scipy have them, with bootstrap intervals over samples and paired tests.

They are computed here, in numpy: scikit-learn and scipy take milliseconds for one of the thousands of samples that an
interval needs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.evaluate.results import Difference, Interval

RESAMPLES = 1000
EXCHANGES = 10_000
Answers = NDArray[Any]


def _accuracy(labels: Answers, answers: Answers) -> float:
    return float(np.mean(labels == answers))


def _f1(labels: Answers, answers: Answers) -> float:
    hits = np.sum((labels == 1) & (answers == 1))
    return float(2 * hits / max(1, np.sum(labels == 1) + np.sum(answers == 1)))


def _f1_macro(labels: Answers, answers: Answers) -> float:
    counts = _counts(labels, answers)
    return float(np.mean(2 * counts.diagonal() / (counts.sum(axis=0) + counts.sum(axis=1))))


def _matthews(labels: Answers, answers: Answers) -> float:
    counts = _counts(labels, answers).astype(float)
    true, given, total = counts.sum(axis=1), counts.sum(axis=0), counts.sum()
    spread = (total**2 - true @ true) * (total**2 - given @ given)
    return float((counts.trace() * total - true @ given) / np.sqrt(spread)) if spread > 0 else 0.0


def _counts(labels: Answers, answers: Answers) -> NDArray[np.int64]:
    """[classes that occur, classes that occur]: how often a label got an answer."""
    names, codes = np.unique(np.concatenate([labels, answers]), return_inverse=True)
    pairs = codes[: len(labels)] * len(names) + codes[len(labels) :]
    return np.bincount(pairs, minlength=len(names) ** 2).reshape(len(names), len(names))


def _pearson(labels: Answers, answers: Answers) -> float:
    if np.all(labels == labels[0]) or np.all(answers == answers[0]):
        return 0.0  # constant answers: no correlation
    x, y = labels - np.mean(labels, dtype=float), answers - np.mean(answers, dtype=float)
    spread = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / spread) if spread > 0 else 0.0


def _spearman(labels: Answers, answers: Answers) -> float:
    from scipy.stats import rankdata

    if np.isnan(answers.astype(float)).any():
        return 0.0
    return _pearson(rankdata(labels), rankdata(answers))


METRICS: dict[str, Callable[[Answers, Answers], float]] = {
    "accuracy": _accuracy,
    "exact_match": _accuracy,
    "f1": _f1,
    "f1_macro": _f1_macro,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
"""(labels, answers) → score. `f1` is of class 1 of two; `f1_macro` the mean over classes."""


def measure(metric: str, labels: Sequence[Any], answers: Sequence[Any]) -> float:
    """One metric's value."""
    return METRICS[metric](np.asarray(labels), np.asarray(answers))


def resampled(task: str, metric: str, labels: Sequence[Any], answers: Sequence[Any]) -> NDArray[np.float64]:
    """The metric on RESAMPLES bootstrap samples: for every model the same rows of a task, for every task others."""
    true, given = np.asarray(labels), np.asarray(answers)
    if METRICS[metric] is _accuracy:
        return (true == given)[_bootstrap_rows(task, len(true))].mean(axis=1)
    return _slowly(task, metric, tuple(labels), tuple(answers))


@lru_cache(maxsize=256)
def _slowly(task: str, metric: str, labels: tuple[Any, ...], answers: tuple[Any, ...]) -> NDArray[np.float64]:
    """Seconds where accuracy takes milliseconds, and asked for again by every average, ratio and difference."""
    true, given = np.asarray(labels), np.asarray(answers)
    found = np.array([METRICS[metric](true[row], given[row]) for row in _bootstrap_rows(task, len(true))])
    found.flags.writeable = False
    return found


def _bootstrap_rows(task: str, count: int) -> NDArray[np.int64]:
    return _generator(task, "bootstrap").integers(0, count, (RESAMPLES, count))


def interval(value: float, draws: NDArray[np.float64]) -> Interval:
    """A value with the middle 95 % of its bootstrap draws."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(value=value, low=float(low), high=float(high))


def difference(
    ours: Mapping[str, Sequence[Any]], theirs: Mapping[str, Sequence[Any]], labels: Mapping[str, Sequence[Any]],
    metrics: Mapping[str, str],
) -> Difference:  # fmt: skip
    """Mean over tasks of our score minus theirs. Pairing by sample takes out what makes a sample hard for both.

    The interval is the paired bootstrap's; p is of the randomisation test that exchanges the two models' answers.
    """
    values, draws, null = [], [], []
    quick = all(METRICS[metric] is _accuracy for metric in metrics.values())
    count = EXCHANGES if quick else EXCHANGES // 10
    for task, metric in metrics.items():
        value = measure(metric, labels[task], ours[task]) - measure(metric, labels[task], theirs[task])
        values.append(value)
        pair = (resampled(task, metric, labels[task], answers[task]) for answers in (ours, theirs))
        draws.append(np.subtract(*pair))
        null.append(_exchanged(task, metric, labels[task], ours[task], theirs[task], count))
    found = float(np.mean(values))
    spread = interval(found, np.mean(draws, axis=0))
    chance = np.mean(null, axis=0)
    p = (1 + int(np.sum(np.abs(chance) >= abs(found) - 1e-12))) / (1 + len(chance))
    return Difference(value=found, low=spread.low, high=spread.high, p=float(p))


def _exchanged(
    task: str, metric: str, labels: Sequence[Any], ours: Sequence[Any], theirs: Sequence[Any], count: int
) -> NDArray[np.float64]:
    """`count` differences that chance alone would give."""
    true, a, b = np.asarray(labels), np.asarray(ours), np.asarray(theirs)
    generator = _generator(task, "exchange")
    if METRICS[metric] is _accuracy:  # only samples that one of the two gets right can tell
        split = int(np.sum((true == a) != (true == b)))
        return (2 * generator.binomial(split, 0.5, count) - split) / len(true)
    swaps = generator.random((count, len(true))) < 0.5
    found = [METRICS[metric](true, np.where(s, b, a)) - METRICS[metric](true, np.where(s, a, b)) for s in swaps]
    return np.array(found)


def _generator(task: str, purpose: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{purpose}\0{task}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))
