"""A model on clean inputs and on corrupted ones: how much of the experts is left when the images get worse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from plait.errors import RecipeError, nearest
from plait.evaluate.corrupt import NAMES, SEVERITIES
from plait.evaluate.measure import Bench
from plait.evaluate.results import Corruption, Robustness
from plait.evaluate.subjects import Options, Subject
from plait.evaluate.unseen import refuse_merged
from plait.suites.definition import Suite

SEVERITY = 3
"""Where none is said: the middle."""


def corruptions(names: Sequence[str], severity: int | None = None) -> list[Corruption]:
    """Corruptions by name, each once. Raises RecipeError for a name or a severity that there is not."""
    if severity is not None and not names:
        raise RecipeError(f"--severity {severity}: says how strong corruptions are; name them with --corrupt")
    chosen = SEVERITY if severity is None else severity
    if chosen not in SEVERITIES:
        raise RecipeError(f"--severity {chosen}: must be a whole number from 1 (faint) to 5 (strong)")
    for name in names:
        if name not in NAMES:
            raise RecipeError(f"--corrupt {name}: is no corruption{nearest(name, NAMES)}")
    return [Corruption(name=name, severity=chosen) for name in dict.fromkeys(names)]


def robustness(
    model: str | Path, suite: Suite, under: Sequence[Corruption], *, tasks: list[str] | None = None,
    unseen: Sequence[str] = (), options: Options | None = None,
) -> Robustness:  # fmt: skip
    """Measure a model on a suite's images as they are and under every corruption, beside the experts on both.

    Raises RecipeError for a suite of texts, and whatever `evaluate` raises.
    """
    suite = suite.only(tasks)
    bench, subject = Bench(suite, options, unseen=unseen), Subject.model(suite, str(model))
    corrupted = [bench.under(corruption) for corruption in under]
    refuse_merged(subject, bench.unseen)
    return Robustness(
        clean=bench.evaluate(subject), corrupted=[one.beside_experts(one.evaluate(subject)) for one in corrupted]
    )
