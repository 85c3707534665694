"""What the reading verbs print: the same data as JSON for programs, as tables for people."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from plait.methods.contract import MergeMethod, Parameter
from plait.plan import Plan
from plait.show_check import check_data, models_text, notes_text
from plait.show_merge import emit as emit
from plait.units import show_bytes, show_seconds

_INTERPRETER_BYTES = 180 * 10**6
"""Anonymous memory of Python with torch loaded, measured (docs/LOG.md)."""
_READ, _WRITE = 0.2e-9, 1.1e-9
"""Seconds of a thread per byte: copied from the page cache; written and hashed (docs/performance.md)."""
_DISK = 1e9
"""Bytes a second that are read from a disk where the page cache cannot hold the inputs: an assumption."""


@dataclass(frozen=True)
class Budget:
    """What the run may use."""

    memory: int
    threads: int


def console() -> Console:
    """Standard output, wide enough for paths when it is not a terminal."""
    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=140)


def estimate_seconds(plan: Plan, budget: Budget) -> float:
    """A rough time: bytes moved and the method's arithmetic, on the threads; with a warm page cache."""
    elements = sum(tensor.spec.numel * max(len(tensor.inputs), 1) for tensor in plan.merged)
    moving = plan.bytes_in * _READ + plan.bytes_out * _WRITE
    return 0.35 + (moving + elements * plan.method.cost * 1e-9) / budget.threads


def _cold(plan: Plan) -> str:
    """What the disk adds where memory cannot hold the inputs."""
    if plan.bytes_in < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2:
        return ""
    took = show_seconds(plan.bytes_in / _DISK)
    return f"; the inputs do not fit there: at {show_bytes(int(_DISK))} a second reading them takes {took}"


def plan_data(plan: Plan, budget: Budget) -> dict[str, Any]:
    """Everything about every tensor."""
    need, name = plan.least_memory()
    working = sorted((tensor.working_bytes() for tensor in plan.tensors), reverse=True)[: budget.threads]
    return {
        **check_data(plan),
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "buffers_peak": min(sum(working), max(budget.memory, need)),
        "least_memory": need,
        "least_memory_tensor": name,
        "fits": need <= budget.memory,
        "seconds_estimate": round(estimate_seconds(plan, budget), 1),
        "refused": {refusal.name: refusal.why for refusal in plan.refused},
        "tensors": [
            {
                "name": tensor.name, "action": tensor.action, "reason": tensor.reason, "shape": list(tensor.shape),
                "dtype": tensor.dtype, "from": {item.model: item.stored for item in tensor.inputs},
                "base": tensor.base.stored if tensor.base else None,
                "parameters": {key.rstrip("_"): value for key, value in tensor.keywords.items()},
            }
            for tensor in plan.tensors
        ],
    }  # fmt: skip


def plan_text(plan: Plan, budget: Budget, *, every: bool) -> None:
    """Tables of models and tensors, then bytes, memory and time."""
    out = console()
    data = plan_data(plan, budget)
    models_text(plan)
    table = Table("tensor", "count", "shape", "what", "why", "parameters", box=None, header_style="bold")
    table.columns[0].overflow = "fold"
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for tensor in data["tensors"]:
        name = tensor["name"] if every else re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor["name"])
        shape = "×".join(map(str, tensor["shape"])) or "scalar"
        key = (name, f"{shape} {tensor['dtype']}", tensor["action"], escape(tensor["reason"]))
        groups.setdefault(key, []).append(tensor["parameters"])
    for (name, shape, action, reason), members in groups.items():
        style = {"merge": "", "copy": "dim"}[action]
        table.add_row(escape(name), str(len(members)), shape, action, reason, _brief(members, plan.method), style=style)
    for task, items in data["per_task"].items():
        table.add_row(
            escape(", ".join(items)), str(len(items)), "", "kept", f"{task}'s own, in heads/", "", style="cyan"
        )
    for name, why in data["refused"].items():
        table.add_row(escape(name), "1", "", "refused", escape(why), "", style="red")
    out.print(table)
    fits = "" if data["fits"] else f" [red](needs at least {show_bytes(data['least_memory'])})[/]"
    out.print(
        f"\nreads {show_bytes(data['bytes_in'])}, writes {show_bytes(data['bytes_out'])}; buffers "
        f"{show_bytes(data['buffers_peak'])} of {show_bytes(budget.memory)}{fits}, beside about "
        f"{show_bytes(_INTERPRETER_BYTES)} for Python and torch; about {show_seconds(data['seconds_estimate'])} on "
        f"{budget.threads} thread(s) with a warm cache{_cold(plan)}"
    )
    notes_text(plan.notes)


def methods_data(methods: Mapping[str, MergeMethod]) -> list[dict[str, Any]]:
    """Methods and their parameters."""
    return [
        {
            "name": method.name,
            "summary": method.summary,
            "paper": method.paper,
            "base": method.base,
            "experts": list(method.experts),
            "scope": method.scope,
            "parameters": {
                p.name: {"type": p.describe(), "default": p.default, "required": p.required, "per_model": p.per_model}
                for p in method.parameters.values()
            },
            "fit": {p.name: {"type": p.describe(), "default": p.default} for p in method.learned.parameters.values()}
            if method.learned is not None
            else None,
            "route": {p.name: {"type": p.describe(), "default": p.default} for p in method.dynamic.parameters.values()}
            if method.dynamic is not None
            else None,
        }
        for method in methods.values()
    ]


def methods_text(methods: Mapping[str, MergeMethod], *, full: bool) -> None:
    """A table of all, or one in full."""
    out = console()
    if not full:
        table = Table("method", "what it does", "paper", box=None, header_style="bold")
        for method in methods.values():
            table.add_row(f"[bold]{method.name}[/]", method.summary, method.paper)
        out.print(table)
        return
    for method in methods.values():
        least, most = method.experts
        count = str(least) if least == most else f"{least} or more" if most is None else f"{least} to {most}"
        out.print(f"[bold]{method.name}[/]  ({method.paper})\n")
        told = method.summary if method.dynamic is not None else method.fn.__doc__ or ""
        out.print(told.strip().replace("\n    ", "\n"), markup=False)
        out.print(f"\nbase_model: {method.base}; experts: {count}\n")
        table = Table("parameter", "values", "default", box=None, header_style="bold")
        for parameter in method.parameters.values():
            default = "required" if parameter.required else str(parameter.default)
            table.add_row(parameter.name, parameter.describe().replace("[", r"\["), default)
        if method.parameters:
            out.print(table)
        if method.dynamic is not None:
            out.print(f"\nis routed, as route: says; the rest is merged by shared: ({method.dynamic.shared})\n")
            _options("route option", method.dynamic.parameters, out)
        if method.learned is not None:
            out.print(f"\nlearns from {method.learned.sees} (data:), as fit: says\n")
            _options("fit option", method.learned.parameters, out)


def _options(title: str, options: Mapping[str, Parameter], out: Console) -> None:
    table = Table(title, "values", "default", box=None, header_style="bold")
    for option in options.values():
        table.add_row(option.name, option.describe().replace("[", r"\["), str(option.default))
    out.print(table)


def inspect_text(data: dict[str, Any], *, every: bool) -> None:
    """Norms and cosines overall, then by kind of tensor."""
    out = console()
    tasks, overall = data["tasks"], data["overall"]
    table = Table("task vector", "norm", "of base", *[f"cos {t}" for t in tasks], box=None, header_style="bold")
    for k, task in enumerate(tasks):
        cosines = [f"{value:+.3f}" if j != k else "·" for j, value in enumerate(overall["cosine"][k])]
        table.add_row(task, f"{overall['norm'][task]:.4g}", f"{overall['relative_norm'][task]:.2%}", *cosines)
    out.print(table)
    out.print(
        f"\n{overall['parameters']:,} parameters, {overall['changed']:.1%} changed by some expert; where any did, "
        f"{overall['unanimous']:.1%} agree in sign\n"
    )
    rows = data["tensors"] if every else data["groups"]
    head = "tensor" if every else "kind of tensor"
    table = Table(
        head, "parameters", "largest norm of base", "mean cos", "agree in sign", box=None, header_style="bold"
    )
    count = len(tasks)
    for name, part in rows.items():
        off = [part["cosine"][i][j] for i in range(count) for j in range(i + 1, count)]
        mean = f"{sum(off) / len(off):+.3f}" if off else "·"
        largest = max(part["relative_norm"].values())
        table.add_row(escape(name), f"{part['parameters']:,}", f"{largest:.2%}", mean, f"{part['unanimous']:.1%}")
    out.print(table)


def _brief(members: list[dict[str, Any]], method: MergeMethod) -> str:
    """Parameters that are not the method's defaults, `first → last` where they change over a group of tensors."""
    parts = []
    for parameter in method.parameters.values():
        values = [_value_text(member.get(parameter.keyword.rstrip("_"))) for member in members]
        if set(values) - {_value_text(parameter.default)}:
            text = values[0] if len(set(values)) == 1 else f"{values[0]} → {values[-1]}"
            parts.append(f"{parameter.name} {text}")
    return escape("; ".join(parts))


def _value_text(value: Any) -> str:
    if isinstance(value, list):
        texts = [_value_text(item) for item in value]
        return texts[0] if len(set(texts)) == 1 else "(" + ", ".join(texts) + ")"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
