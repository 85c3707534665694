"""What a fit has learned, checked: a row's `learned` is read from a file, and may hold anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pydantic
from pydantic import BaseModel, Field

from plait.errors import CheckpointError


class Reading(BaseModel):
    """How the merged model stands beside the experts; a number that was none in the fit is None."""

    agreement: float
    divergence: float | None = None
    spread: float | None = None


class Check(Reading):
    """A moment of the fit: means, and every task."""

    step: int
    tasks: dict[str, Reading]


class History(BaseModel):
    """The loss at every step, and the checks."""

    loss: list[float | None] = Field(default_factory=list)
    checks: list[Check] = Field(default_factory=list)
    mask_steps: int | None = None
    """Where two fits follow each other: the steps of the first."""


class Seen(BaseModel):
    """One task's inputs."""

    inputs: int


class Ending(BaseModel):
    """What the guard said of a fit; empty while all was well."""

    verdict: str = ""


class Summary(Ending):
    """How the fit ended."""

    steps_taken: int | None = None
    kept_step: int | None = None
    agreement: float | None = None
    """With the experts, of what was kept."""
    more_confident_than_the_expert: list[str] = Field(default_factory=list)
    mask: Ending = Field(default_factory=Ending)
    """Of the first of two fits."""


class Shares(BaseModel):
    """Of one tensor's mask: its mean, and shares of its entries."""

    mean: float
    quarter: float = Field(alias="under_0.25")
    half: float = Field(alias="under_0.5")
    above: float = Field(alias="over_0.75")


class Fitted(BaseModel):
    """A row's `learned`."""

    tasks: list[str]
    fit: dict[str, Any] = Field(default_factory=dict)
    objective: str | None = None
    data: dict[str, Seen] = Field(default_factory=dict)
    split: str = "adapt"
    summary: Summary = Field(default_factory=Summary)
    history: History = Field(default_factory=History)
    coefficients: dict[str, list[float]] = Field(default_factory=dict)
    masks: dict[str, Shares] = Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Fitted:
        if any(len(values) != len(self.tasks) for values in self.coefficients.values()):
            raise ValueError(f"every granule must have {len(self.tasks)} coefficients, as there are as many tasks")
        if any(set(check.tasks) - set(self.tasks) for check in self.history.checks):
            raise ValueError("a check has a task that the fit does not have")
        return self

    @property
    def before(self) -> int:
        """Steps of the first of two fits."""
        return self.history.mask_steps or 0

    @property
    def kept(self) -> int | None:
        """The step that was kept, counted from the first step of all."""
        return None if self.summary.kept_step is None else self.before + self.summary.kept_step


def read_learned(learned: Mapping[str, Any]) -> Fitted:
    """The checked facts. Raises CheckpointError when they are something else."""
    try:
        return Fitted.model_validate(learned)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("learned", *first["loc"])))
        raise CheckpointError(
            f"{where}: {first['msg']}; it must be what plait fit writes, so run plait compare again"
        ) from None
