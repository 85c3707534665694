"""The form of state.json: as much of it as anything here reads, for a state may come from a stranger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
from pydantic import BaseModel, Field, model_validator

from plait.errors import CheckpointError


class _Data(BaseModel):
    """What was seen of one task."""

    inputs: int
    from_: str = Field(alias="from")


class _Judged(BaseModel):
    """One task on the inputs that were only watched."""

    agreement: float
    divergence: float
    spread: float
    entropy: float
    expert_entropy: float


class _Summary(BaseModel):
    """How the fit ended."""

    labels: dict[str, list[str]] = {}
    inputs: dict[str, int] = {}
    verdict: str | None = None
    best_step: int | None = None
    kept_step: int | None = None
    steps_taken: int | None = None
    routed: float = 0.0
    kept_epoch: int | None = None
    tasks: dict[str, _Judged] = {}
    masked_alone_agrees: dict[str, float] = {}
    confusion: dict[str, list[int]] = {}

    @model_validator(mode="after")
    def _fits(self) -> _Summary:
        if self.masked_alone_agrees and not set(self.tasks) <= set(self.masked_alone_agrees):
            raise ValueError("masked_alone_agrees must have every task")
        return self


_MOST = 1e30
"""No option is larger; JSON's whole numbers may be larger than any float."""


class _Facts(BaseModel):
    """All of it."""

    method: str
    paper: str
    sees: str
    tasks: list[str]
    models: dict[str, str]
    seed: int
    split: str
    vectors: dict[str, Any]
    fit: dict[str, str | bool | int | float | None]
    data: dict[str, _Data]
    summary: _Summary

    @model_validator(mode="after")
    def _fits(self) -> _Facts:
        for key, kind in {"granularity": str, "init": (int, float), "concrete": (int, float)}.items():
            if key in self.fit and not isinstance(self.fit[key], kind):
                raise ValueError(f"fit.{key} is of the wrong kind")
        for key, value in self.fit.items():
            if isinstance(value, (int, float)) and not -_MOST <= value <= _MOST:
                raise ValueError(f"fit.{key} is beyond all numbers in use")
        if not self.fit.get("concrete", 1) > 0:  # pyright: ignore[reportOperatorIssue]
            raise ValueError("fit.concrete must be above zero")
        return self


def check_facts(facts: dict[str, Any], path: Path) -> None:
    """Refuse what is not of this form. Raises CheckpointError naming the file and the key."""
    try:
        _Facts.model_validate(facts, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: {where}: {first['msg']}; the file is damaged: fit again") from None
