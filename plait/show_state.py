"""A learned state, as data and as text: what `plait fit` and `plait inspect STATE` print."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from plait.methods.learned import expected
from plait.show import console
from plait.state import NUMBERS, State
from plait.units import show_bytes


def state_data(state: State) -> dict[str, Any]:
    """Facts, history, coefficients and masks of a state."""
    facts = {key: value for key, value in state.facts.items() if key != "schema"}
    return {
        **facts, "folder": str(state.folder), "bytes": (state.folder / NUMBERS).stat().st_size,
        "coefficients": coefficients(state), "masks": masks(state),
    }  # fmt: skip


def coefficients(state: State) -> dict[str, list[float]]:
    """Granule → λ of every task, in the tasks' order."""
    found = {}
    for name in state.names():
        if name.startswith("coefficients/"):
            values = state.tensor(name)
            assert values is not None
            found[name.removeprefix("coefficients/")] = values.tolist()
    return found


def masks(state: State) -> dict[str, dict[str, float]]:
    """Tensor → of its mask without noise: mean, share of entries under 0.25, under 0.5 and over 0.75."""

    found = {}
    for name in state.names():
        if not name.startswith("mask/"):
            continue
        stored = state.tensor(name)
        assert stored is not None
        scale = state.mask_scale(name.removeprefix("mask/"))
        mask = expected(stored.float() * scale, float(state.option("concrete")))
        shares = ((mask < 0.25), (mask < 0.5), (mask > 0.75))
        values = [mask.mean(), *(share.float().mean() for share in shares)] if mask.numel() else [0.0] * 4
        keys = ("mean", "under_0.25", "under_0.5", "over_0.75")
        found[name.removeprefix("mask/")] = {k: float(v) for k, v in zip(keys, values, strict=True)}
    return found


def state_text(state: State) -> None:
    """A state for people: what was learned from what, how it ended, the numbers."""
    out, facts = console(), state.facts
    summary = facts["summary"]
    out.print(f"[bold]{escape(facts['method'])}[/] ({escape(facts['paper'])}), {len(facts['tasks'])} experts; "
              f"{show_bytes((state.folder / NUMBERS).stat().st_size)} in {escape(str(state.folder))}")  # fmt: skip
    out.print(f"  fit: {escape(_settings(facts['fit']))}; seed {facts['seed']}", style="dim")
    for task, item in facts["data"].items():
        out.print(
            f"  {escape(task)}: {item['inputs']} inputs of {escape(item['from'])} ({escape(facts['split'])})",
            style="dim",
        )
    if summary.get("verdict"):
        out.print(f"[yellow]stopped:[/] {escape(summary['verdict'])}; kept step {summary['best_step']}")
    elif "kept_step" in summary:
        out.print(f"kept step {summary['kept_step']} of {summary['steps_taken']}")
    if "routed" in summary:
        out.print(
            f"kept epoch {summary['kept_epoch']}: {summary['routed']:.1%} of watched inputs go to their own expert"
        )
    for table in (_tasks(summary), _confusion(summary, facts["tasks"]), _numbers(state), _masks(state)):
        if table is not None:
            out.print()
            out.print(table)


def _settings(fit: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in fit.items())


def _tasks(summary: dict[str, Any]) -> Table | None:
    if "tasks" not in summary:
        return None
    table = Table(box=None, header_style="bold", title="on inputs that were only watched")
    alone = summary.get("masked_alone_agrees", {})
    names = ["task", "agrees with its expert", "KL", "spread", "entropy", "expert's"]
    for name in [*names, *(["expert masked alone agrees"] if alone else [])]:
        table.add_column(name, justify="left" if name == "task" else "right")
    for task, item in summary["tasks"].items():
        cells = [f"{item['agreement']:.1%}", f"{item['divergence']:.3f}", f"{item['spread']:.0%}",
                 f"{item['entropy']:.3f}", f"{item['expert_entropy']:.3f}"]  # fmt: skip
        table.add_row(escape(task), *cells, *([f"{alone[task]:.1%}"] if alone else []))
    table.caption = "spread: entropy of the mean prediction, as a share of the expert's"
    return table


def _confusion(summary: dict[str, Any], experts: list[str]) -> Table | None:
    if "confusion" not in summary:
        return None
    table = Table(box=None, header_style="bold", title="watched inputs by the expert they go to")
    for name in ("task", *experts):
        table.add_column(escape(name), justify="left" if name == "task" else "right")
    for task, counts in summary["confusion"].items():
        table.add_row(escape(task), *(str(count) if count else "·" for count in counts))
    return table


def _numbers(state: State) -> Table | None:
    found = coefficients(state)
    if not found:
        return None
    table = Table(box=None, header_style="bold", title=f"coefficients of {len(found)} granules")
    for name in ("task", "least", "mean", "greatest"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for place, task in enumerate(state.facts["tasks"]):
        values = [row[place] for row in found.values()]
        table.add_row(escape(task), f"{min(values):.3f}", f"{sum(values) / len(values):.3f}", f"{max(values):.3f}")
    return table


def _masks(state: State) -> Table | None:
    found = masks(state)
    if not found:
        return None
    table = Table(box=None, header_style="bold", title=f"masks of {len(found)} tensors, without noise")
    for name in ("", "mean", "under 0.25", "under 0.5", "over 0.75"):
        table.add_column(name, justify="right" if name else "left")
    for label, pick in (("least", min), ("greatest", max)):
        cells = [pick(row[key] for row in found.values()) for key in ("mean", "under_0.25", "under_0.5", "over_0.75")]
        table.add_row(label, *(f"{value:.3f}" for value in cells))
    return table
