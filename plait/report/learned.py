"""What was learned before a merge: how the fit went, step by step, and the coefficients and masks that it gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from plait.evaluate.results import Row
from plait.report.figures import Figure, Key, Trace, axis, bold, colour, layout, line, symbol
from plait.report.fitted import Fitted, Reading, read_learned
from plait.report.granules import heat, in_depth
from plait.report.text import breakable, count, escape, percent, plain, prose, signed
from plait.units import show_seconds

_MINIMISED = {
    "entropy": "the entropy of the predictions", "agreement": "the divergence from the experts' answers",
    "contrastive": "the contrastive loss of the pairs",
}  # fmt: skip


def learned_parts(row: Row) -> tuple[str, list[Figure]] | None:
    """Words in HTML and figures of a row that learned; None for one that did not."""
    if not row.learned:
        return None
    found = read_learned(row.learned)
    made = [
        _loss(found),
        _over_steps(
            found, "Agreement with the experts", "agree, %",
            lambda reading: 100 * reading.agreement, lambda value: f"{value:.1f} %",
            "The share of inputs, only watched and never learned from, that the merged model answers as the task's own "
            "expert does. No label is read. The guard judges by this, for the loss may fall while it falls too.",
        ),
        _over_steps(
            found, "Divergence from the experts", "KL divergence, nats",
            lambda reading: reading.divergence, lambda value: f"{value:.3f} nats",
            "How far the merged model's probabilities are from the expert's on the same inputs; 0 would be the expert "
            "itself. It feels what agreement does not: the same answer, but surer or less sure.",
        ),
        _over_steps(
            found, "Spread of the predictions", "of the expert's, %",
            lambda reading: None if reading.spread is None else 100 * reading.spread, lambda value: f"{value:.0f} %",
            "The entropy of the mean prediction, as a share of the expert's. A task far below 100 is collapsing: a few "
            "classes swallow the others.",
        ),
        _coefficients(found),
        _masks(found),
    ]  # fmt: skip
    return _words(row, found), [figure for figure in made if figure is not None]


def _words(row: Row, found: Fitted) -> str:
    facts = [("the fit took", show_seconds(row.fit_seconds))] if row.fit_seconds is not None else []
    if found.data:
        facts.append(("learned from", _seen(found)))
    facts.append(("minimises", _minimised(found)))
    facts.append(("settings", ", ".join(f"{key} {plain(value)}" for key, value in sorted(found.fit.items()))))
    if found.summary.more_confident_than_the_expert:
        facts.append(("surer than the expert", ", ".join(found.summary.more_confident_than_the_expert)))
    verdict = f'<p class="finding">{prose(said)}</p>' if (said := _verdict(found)) else ""
    lines = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts if value)
    return f'<h3 class="fit">{breakable(row.label)}</h3>{verdict}<dl class="facts">{lines}</dl>'


def _verdict(found: Fitted) -> str:
    """How the fit ended, and which step was kept."""
    summary = found.summary
    if not found.history.loss and not found.history.checks:  # learned in closed form, or by steps that nobody noted
        agree = None if summary.agreement is None else percent(summary.agreement)
        return f"It agrees with the experts on {agree} % of the inputs that were only watched." if agree else ""
    taken = summary.steps_taken or len(found.history.loss) - found.before
    first = f"The mask took {count(found.before, 'step')}, the coefficients came after it. " if found.before else ""
    if summary.mask.verdict:
        first += f"The guard ended the mask's fit: {summary.mask.verdict}. "
    kept = f"step {found.kept}" if found.kept is not None else "the last step"
    best = (
        "the start, as no later step agreed better" if summary.kept_step == 0 else f"{kept}, where agreement was best"
    )
    if summary.verdict:
        return f"{first}The guard ended the fit after {count(taken, 'step')}: {summary.verdict}. Kept is {best}."
    if not found.history.checks:
        return f"{first}Nothing watched this fit, for there are no experts' answers to compare with; kept is {kept}."
    if not found.fit.get("guard", True):
        return f"{first}The guard was off: kept is {kept}, whatever came before."
    return f"{first}The guard found nothing wrong in {count(taken, 'step')}; kept is {best}."


def _seen(found: Fitted) -> str:
    numbers = {task: seen.inputs for task, seen in found.data.items()}
    if len(set(numbers.values())) == 1:
        each = f"{next(iter(numbers.values()))} of each of {count(len(numbers), 'task')}"
    else:
        each = ", ".join(f"{task} {number}" for task, number in numbers.items())
    warning = "; they are the inputs that scores are measured on" if found.split == "test" else ""
    return f"{count(sum(numbers.values()), 'unlabeled input')} of the {found.split} split ({each}){warning}"


def _minimised(found: Fitted) -> str:
    name = str(found.fit.get("objective", ""))
    return found.objective if found.objective is not None else _MINIMISED.get(name, name)


def _steps_axis(found: Fitted) -> dict[str, Any]:
    last = max(len(found.history.loss), *(check.step for check in found.history.checks), 1)
    return axis("step", showgrid=False, range=[-0.02 * last, 1.02 * last])


def _marks(found: Fitted) -> dict[str, Any]:
    """The step that was kept, named; and the seam between two fits."""
    lines, words = [], []
    if found.before:
        lines.append(_upright(found.before, "solid"))
    if found.kept is not None:
        right = 2 * found.kept > len(found.history.loss)
        lines.append(_upright(found.kept, "dot"))
        words.append({
            "text": "kept", "x": found.kept, "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False,
            "xanchor": "right" if right else "left", "font": {"color": "@soft", "size": 11.5},
        })  # fmt: skip
    return {"shapes": lines, "annotations": words, "margin": {"l": 8, "r": 12, "t": 24, "b": 8}}


def _upright(x: int, dash: str) -> dict[str, Any]:
    return {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "layer": "below",
            "line": {"color": "@soft", "width": 1.2, "dash": dash}}  # fmt: skip


def _loss(found: Fitted) -> Figure | None:
    loss = found.history.loss
    known = [value for value in loss if value is not None]
    if len(known) < 2:
        return None
    # A mean over neighbours: every step has another batch. It does not reach across the seam of two fits.
    width = max(1, len(loss) // 25)
    data: list[Trace] = []
    shown: list[float] = []
    for start, end in ((0, found.before), (found.before, len(loss))):
        x, means, hover = list(range(start, end)), [], []
        for at in x:
            near = [v for v in loss[max(start, at - width) : min(end, at + width + 1)] if v is not None]
            means.append(sum(near) / len(near) if near else None)
            hover.append("" if loss[at] is None else f"step {at}<br>loss {loss[at]:.3f}")
        if x:
            shown += [value for value in means if value is not None]
            data.append(line(x, loss[start:end], "@accent", hover, mode="lines",
                             line={"color": "@accent/45", "width": 1.2}))  # fmt: skip
            data.append(line(x, means, "@ink", hover, mode="lines", line={"color": "@ink", "width": 2.6}))
    seam = " Left of the upright line the mask is learned, right of it the coefficients alone." if found.before else ""
    return Figure(
        title="Loss",
        note="What is minimised, summed over the tasks, on the inputs of each step; the heavy line is a running mean. "
        "That it falls says that the fit works, not that the answers get better." + seam,
        finding=f"The running mean goes from {shown[0]:.3f} to {shown[-1]:.3f} in {count(len(loss), 'step')}.",
        data=data,
        layout=layout(xaxis=_steps_axis(found), yaxis=axis("loss"), **_marks(found)),
        height=330,
        keys=(
            Key("each step", tuple(range(0, len(data), 2)), "@accent/45", line=True),
            Key("running mean", tuple(range(1, len(data), 2)), "@ink", "circle", line=True),
        ),
        half=bool(found.history.checks),
    )


def _over_steps(
    found: Fitted, title: str, scale: str, pick: Callable[[Reading], float | None], show: Callable[[float], str],
    note: str,
) -> Figure | None:  # fmt: skip
    """A number of the checks: every task, and the heavy line of the mean."""
    told = [(check.step, value) for check in found.history.checks if (value := pick(check)) is not None]
    if len(told) < 2:
        return None
    data: list[Trace] = []
    keys: list[Key] = []
    for place, task in enumerate(found.tasks):
        at = [(check.step, value) for check in found.history.checks
              if task in check.tasks and (value := pick(check.tasks[task])) is not None]  # fmt: skip
        if at:
            keys.append(Key(task, (len(data),), colour(place), symbol(place), line=True))
            mark = {"color": colour(place), "size": 5, "symbol": symbol(place)}
            data.append(_curve(task, at, show, colour(place), 1.2, marker=mark, opacity=0.7))
    lead = Key("mean", (len(data),), "@ink", "circle", line=True)
    data.append(_curve("mean", told, show, "@ink", 2.8, marker={"color": "@ink", "size": 7}))
    (first, start), (last, end) = told[0], told[-1]
    finding = f"The mean goes from {show(start)} at step {first} to {show(end)} at step {last}"
    if found.kept in dict(told) and found.kept not in (first, last):
        finding += f"; kept is step {found.kept}, with {show(dict(told)[found.kept])}"
    return Figure(
        title=title,
        note=note,
        finding=finding + ".",
        data=data,
        layout=layout(xaxis=_steps_axis(found), yaxis=axis(scale), **_marks(found)),
        height=330,
        keys=(lead, *keys),
        half=True,
    )


def _curve(
    name: str, at: list[tuple[int, float]], show: Callable[[float], str], paint: str, width: float, **more: Any
) -> Trace:
    x: list[int] = []
    y: list[float | None] = []
    hover: list[str] = []
    for step, value in at:
        if x and step <= x[-1]:  # a second fit begins where the first one ended: no line leads over
            x, y, hover = [*x, step], [*y, None], [*hover, ""]
        x, y, hover = [*x, step], [*y, value], [*hover, f"{bold(name)}, step {step}<br>{show(value)}"]
    return line(x, y, paint, hover, line={"color": paint, "width": width}, **more)


def _coefficients(found: Fitted) -> Figure | None:
    if not found.coefficients or not found.tasks:
        return None
    names, runs = in_depth(found.coefficients)
    cells = [[found.coefficients[name][k] for name in names] for k in range(len(found.tasks))]
    means = {task: sum(row) / len(row) for task, row in zip(found.tasks, cells, strict=True)}
    low, high = min(map(min, cells)), max(map(max, cells))
    if low == high:
        return None  # as after a fit whose start was kept: a field of one colour
    start = float(found.fit.get("init", (low + high) / 2))
    far = max(high - start, start - low, 1e-3)
    most, least = max(means, key=lambda t: means[t]), min(means, key=lambda t: means[t])
    kinds = ("tensor", "layer", "block")
    per = {"task": "for all tensors", **{kind: f"and {kind}, from input to output" for kind in kinds}}
    told = f"They lie between {_number(low)} and {_number(high)}"
    if most != least:
        told += f"; in the mean {most} has the largest ({_number(means[most])}), {least} the smallest "
        told += f"({_number(means[least])})"
    return Figure(
        title="Coefficients",
        note=f"How heavy each expert's task vector is in the merge: one number per expert "
        f"{per.get(str(found.fit.get('granularity')), 'and granule, from input to output')}. Cells without colour "
        f"stayed at the start, {_number(start)}; one colour stands for more than that, the other for less.",
        finding=told + ".",
        **heat(names, runs, found.tasks, cells, _number, (start - far, start + far),
                [[0, "@cool"], [0.5, "@raised"], [1, "@heat"]]),
    )  # fmt: skip


def _masks(found: Fitted) -> Figure | None:
    if not found.masks:
        return None
    names, runs = in_depth(found.masks)
    parts = [found.masks[name] for name in names]
    rows = ["under 0.25", "under 0.5", "over 0.75"]
    cells = [[p.quarter for p in parts], [p.half for p in parts], [p.above for p in parts]]
    below = max(range(len(names)), key=lambda i: cells[1][i])
    return Figure(
        title="Masks",
        note="The mask scales every entry of the task vectors, by a number between 0 and 1: the share of each tensor's "
        "entries that it nearly takes out (under 0.25), makes smaller (under 0.5) and keeps (over 0.75), from input to "
        "output.",
        finding=f"In the mean over {count(len(names), 'tensor')}, {percent(sum(cells[1]) / len(names))} % of the "
        f"entries are under 0.5; most are so in {names[below]} ({percent(cells[1][below])} %).",
        **heat(names, runs, rows, cells, lambda value: f"{percent(value, 0)} %", (0.0, max(0.01, *map(max, cells))),
                [[0, "@raised"], [1, "@heat"]], percents=True),
    )  # fmt: skip


def _number(value: float) -> str:
    return signed(f"{value:.2f}")
