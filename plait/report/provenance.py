"""What the numbers stand on: recipes, models with their fingerprints, suite, protocol, versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from plait.evaluate.results import Evaluation
from plait.report.boards import Board, Material
from plait.report.text import MISSING, breakable, clean, count, escape
from plait.units import show_bytes


def recipes(material: Material) -> str:
    """Every recipe, closed, with a button that copies it; empty when there is none."""
    made = []
    for board in material.boards:
        made += [_recipe(row.label, row.recipe) for row in board.rows if row.recipe]
    made += [_recipe(f"{sweep.method}, swept over {', '.join(sweep.axes)}", sweep.recipe) for sweep in material.sweeps]
    return f'<div class="recipes">{"".join(made)}</div>' if made else ""


def _recipe(label: str, recipe: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    return (
        f'<details class="recipe"><summary>{escape(label)}</summary><div class="code">'
        f'<button type="button" class="copy">Copy</button><pre tabindex="0"><code>{escape(text)}</code></pre></div>'
        f"</details>"
    )


def provenance(material: Material, extra: Mapping[str, str]) -> str:
    """Tables of models, suites, protocols and versions; fingerprints in full on hover."""
    made = [_models(board) for board in material.boards]
    facts: list[tuple[str, str]] = [(escape(key), escape(value)) for key, value in extra.items()]
    for suite in {s.fingerprint: s for s in _suites(material)}.values():
        facts.append((f"suite {escape(suite.name)}", f"{count(len(suite.tasks), 'task')}, {_print(suite.fingerprint)}"))
    machines = sorted({board.machine for board in material.boards if board.machine})
    facts += [("machine", escape(machine)) for machine in machines]
    evaluations = [row.evaluation for board in material.boards for row in board.rows]
    facts += _protocols(evaluations)
    versions = sorted({f"{name} {version}" for found in evaluations for name, version in found.versions.items()})
    if versions:
        facts.append(("versions", escape(", ".join(versions))))
    if facts:
        lines = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts)
        made.append(f'<dl class="facts">{lines}</dl>')
    return "".join(made)


def _suites(material: Material) -> list[Any]:
    return [board.suite for board in material.boards] + [sweep.suite for sweep in material.sweeps]


def _print(fingerprint: str) -> str:
    return f'<code title="{escape(fingerprint)}">{escape(fingerprint[:16])}</code>'


def _models(board: Board) -> str:
    lines = "".join(
        f'<tr><th scope="row">{breakable(row.label)}</th><td>{_print(row.evaluation.model.fingerprint)}</td>'
        f"<td>{row.evaluation.model.parameters / 1e6:,.1f} M</td><td>{show_bytes(row.evaluation.model.bytes)}</td>"
        f'<td class="text path">{escape(row.evaluation.model.path) if row.evaluation.model.path else MISSING}</td></tr>'
        for row in board.rows
    )
    return (
        '<div class="table-scroll" tabindex="0" role="region" aria-label="Models and their fingerprints">'
        '<table class="models"><thead><tr><th scope="col">model</th><th scope="col">fingerprint</th>'
        '<th scope="col">parameters</th><th scope="col">size</th><th scope="col" class="text">folder</th></tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _protocols(evaluations: list[Evaluation]) -> list[tuple[str, str]]:
    """One line for each way of measuring; whose rows, where there are several."""
    found: dict[str, list[str]] = {}
    for evaluation in evaluations:
        p = evaluation.protocol
        mixed = "batches mix all tasks" if p.mixed_batches else "one task a batch"
        chosen = "a sample's task chooses its head" if p.task_id == "head" else "a sample's task chooses the model"
        words = f"batches of {p.batch_size}, {p.dtype} on {p.device}, {mixed}, {chosen}, seed {p.seed}"
        found.setdefault(words, []).append(clean(evaluation.model.label))
    return [
        ("protocol", escape(words if len(found) == 1 else f"{words} ({', '.join(labels)})"))
        for words, labels in found.items()
    ]
