"""The page: one HTML file that needs nothing else. Style, script, plotly and the figures' data are inside.

plotly.js is most of the file, so it travels compressed and the page unpacks it. A content security policy lets exactly
our scripts run, by their hashes, and lets nothing be fetched: whatever text a result holds, it cannot act.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from plait.errors import MachineError
from plait.report.boards import Board, Material
from plait.report.cards import cards
from plait.report.corrupted import corrupted_part
from plait.report.figures import Figure, Key
from plait.report.learned import learned_parts
from plait.report.marks import swatch
from plait.report.provenance import provenance, recipes
from plait.report.routed import routed_parts
from plait.report.scores import task_dots, tradeoffs
from plait.report.sweeps import sweep_figure
from plait.report.table import reading, table, told
from plait.report.text import clean, count, embedded_json, escape, listed, prose, short
from plait.report.vectors import vector_figures

_BOOT = "document.documentElement.classList.add('js')"


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it."""

    anchor: str
    nav: str
    title: str
    body: str


def page_text(material: Material, title: str | None, extra: Mapping[str, str]) -> str:
    """The HTML text."""
    plots: list[Figure] = []
    sections = _sections(material, extra, plots)
    heading = clean(title if title is not None else _title(material))
    nav = "".join(f'<a href="#{section.anchor}">{escape(section.nav)}</a>' for section in sections)
    body = "".join(
        f'<section id="{section.anchor}"><h2>{escape(section.title)}</h2>{section.body}</section>'
        for section in sections
    )
    script = _packaged("script.js")
    plotly, packed = _plotly() if plots else ("", "")
    hashes = " ".join(f"'sha256-{_digest(text)}'" for text in (_BOOT, script, plotly) if text)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
    data = [
        {"data": p.data, "layout": p.layout, "height": p.height, "square": p.square, "narrow": p.narrow} for p in plots
    ]
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}; form-action \'none\'">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<meta name="generator" content="Plait">',
        f"<title>{escape(heading)}</title>",
        '<link rel="icon" href="data:,">',
        f"<style>{_packaged('style.css')}</style>",
        f"<script>{_BOOT}</script>",
        "</head>",
        "<body>",
        f'<header class="bar"><div class="inside"><span class="word">{_LOGO}Plait</span>'
        f'<nav aria-label="Sections">{nav}</nav>'
        '<button type="button" id="theme" aria-label="Switch between light and dark">'
        f"{_SUN}</button></div></header>",
        f'<main><div class="top"><h1>{escape(heading)}</h1>{_subtitle(material)}</div>{cards(material)}{body}',
        "</main>",
        "<footer>Made by Plait from result files; everything in this page is in this file.</footer>",
        f'<script type="application/json" id="figures">{embedded_json(data)}</script>',
        f'<script type="application/octet-stream" id="plotly">{packed}</script>' if plots else "",
        f"<script>{script}</script>",
        "</body>",
        "</html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _sections(material: Material, extra: Mapping[str, str], plots: list[Figure]) -> list[Section]:
    made: list[Section] = []
    for place, board in enumerate(material.boards):
        made += _board_sections(board, place, len(material.boards) > 1, plots)
    swept = [figure for sweep in material.sweeps if (figure := sweep_figure(sweep)) is not None]
    if swept:
        made.append(Section("sweeps", "Sweeps", "Sweeps", _figures(swept, plots)))
    written = recipes(material)
    if written:
        intro = (
            '<p class="note">Each recipe in canonical form: <code>plait merge</code> makes the same model from it.</p>'
        )
        made.append(Section("recipes", "Recipes", "Recipes", intro + written))
    ground = provenance(material, extra)
    if ground:
        intro = (
            '<p class="note">What the numbers stand on. Equal fingerprints mean equal content: of a model’s config and '
            "weights, of a suite’s test inputs and labels.</p>"
        )
        made.append(Section("provenance", "Provenance", "Provenance", intro + ground))
    return made


def _board_sections(board: Board, place: int, several: bool, plots: list[Figure]) -> list[Section]:
    end = f"-{place + 1}" if several else ""
    of = f" on {board.suite.name}" if several else ""
    finding = told(board)
    words = (f'<p class="finding">{prose(finding)}</p>' if finding else "") + f'<p class="note">{reading(board)}</p>'
    made = [Section(f"scores{end}", f"Scores{of}", f"Scores{of}", words + table(board))]
    dots = task_dots(board)
    if dots:
        made.append(Section(f"tasks{end}", f"Tasks{of}", f"Task by task{of}", _figures([dots], plots)))
    under = corrupted_part(board)
    if under:
        made.append(Section(f"corrupted{end}", f"Corrupted{of}", f"Under corruptions{of}", under))
    vectors = vector_figures(board.inspection)
    if vectors:
        made.append(Section(f"vectors{end}", f"Task vectors{of}", f"Task vectors{of}", _figures(vectors, plots)))
    learned = [parts for row in board.rows if (parts := learned_parts(row)) is not None]
    if learned:
        made.append(Section(f"learned{end}", f"Learned{of}", f"What was learned{of}", _by_model(learned, plots)))
    routed = [parts for row in board.rows if (parts := routed_parts(row)) is not None]
    if routed:
        inner = _by_model(routed, plots)
        made.append(Section(f"routed{end}", f"Routed{of}", f"Where inputs were sent{of}", inner))
    costs = tradeoffs(board)
    if costs:
        made.append(Section(f"costs{end}", f"Trade-offs{of}", f"Trade-offs{of}", _figures(costs, plots)))
    return made


def _by_model(parts: list[tuple[str, list[Figure]]], plots: list[Figure]) -> str:
    """Model after model: its words, then its figures."""
    return "".join(said + (_figures(figures, plots) if figures else "") for said, figures in parts)


def _figures(figures: list[Figure], plots: list[Figure]) -> str:
    """HTML of some figures; their data joins the page's list, by number."""
    made = []
    for figure in figures:
        number = len(plots)
        plots.append(figure)
        keys = "".join(_key(key, number) for key in figure.keys)
        phone = " only-phone" if figure.labelled else ""
        legend = "<div></div>"
        if keys:
            legend = f'<div class="keys{phone}" role="group" aria-label="Legend: press to hide or show">{keys}</div>'
        finding = f'<p class="finding">{prose(figure.finding)}</p>' if figure.finding else "<div></div>"
        made.append(
            f'<figure class="{"half" if figure.half else "whole"}"><h3>{escape(figure.title)}</h3>{finding}{legend}'
            f'<div class="plot" id="plot-{number}" role="img" style="min-height:{figure.height}px" '
            f'aria-label="{escape(f"{figure.title}. {figure.finding}")}"></div>'
            f'<figcaption class="note">{prose(figure.note)}</figcaption></figure>'
        )
    return f'<div class="figures">{"".join(made)}</div>'


def _key(key: Key, number: int) -> str:
    traces = ",".join(map(str, key.traces))
    return (
        f'<button type="button" class="key" aria-pressed="true" data-plot="{number}" data-traces="{traces}">'
        f"{swatch(key)}<span>{escape(short(key.label, 40))}</span></button>"
    )


def _title(material: Material) -> str:
    if material.boards:
        rows = [row for board in material.boards for row in board.rows]
        models = [row for board in material.boards for row in board.ranked]
        what = rows[0].label if len(rows) == 1 else count(len(models), "model")
        return f"{what} on {listed(list(dict.fromkeys(board.suite.name for board in material.boards)))}"
    sweep = material.sweeps[0]
    return f"{sweep.method} swept on {sweep.suite.name}"


def _subtitle(material: Material) -> str:
    suites = list(dict.fromkeys(x.suite.name for x in (*material.boards, *material.sweeps)))
    parts = [f"suite{'s' if len(suites) > 1 else ''} {listed(suites)}"]
    tasks = list(dict.fromkeys(t for x in (*material.boards, *material.sweeps) for t in x.suite.tasks))
    parts.append(count(len(tasks), "task"))
    parts += sorted({board.machine for board in material.boards if board.machine})
    return f'<p class="subtitle">{"".join(f"<span>{escape(part)}</span>" for part in parts)}</p>'


def _packaged(name: str) -> str:
    return resources.files("plait.report").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


@cache
def _plotly() -> tuple[str, str]:
    """plotly.js, and the same compressed as text."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MachineError('reports draw with plotly, which is not installed: pip install "plait[eval]"') from None
    text = get_plotlyjs()
    return text, base64.b64encode(zlib.compress(text.encode("utf-8"), 9)).decode("ascii")


_LOGO = (
    '<svg viewBox="0 0 24 24" width="22" height="22" fill="none" stroke-width="2.6" stroke-linecap="round" '
    'aria-hidden="true"><path class="strand a" d="M4 4c0 8 16 8 16 16"/>'
    '<path class="strand b" d="M20 4c0 3-3 5-6 6.8"/><path class="strand b" d="M10 13.2C7 15 4 17 4 20"/>'
    '<path class="strand c" d="M12 4v3.4M12 16.6V20"/></svg>'
)
_SUN = (
    '<svg viewBox="0 0 24 24" width="18" height="18" aria-hidden="true"><circle cx="12" cy="12" r="8" fill="none" '
    'stroke="currentColor" stroke-width="2"/><path d="M12 4a8 8 0 0 1 0 16z" fill="currentColor"/></svg>'
)
