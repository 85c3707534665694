"""The report: what it shows, that hostile names stay text, that it is one file, and that a browser draws all of it."""

from __future__ import annotations

import html.parser
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_browser import CHROMIUM, Browser
from report_results import METHODS, comparison, learned, sweep_of_experts, sweep_over

import plait
from plait.engine import Engine
from plait.errors import CheckpointError, MachineError, RecipeError
from plait.evaluate.results import Comparison, Evaluation, Sweep, dump, load
from plait.inspect import inspect_plan
from plait.report import page as page_module
from plait.report import render, write_report
from plait.report.boards import gather
from plait.report.figures import SYMBOLS, Key, symbol
from plait.report.granules import in_depth
from plait.report.inspected import by_depth, read_inspection
from plait.report.marks import swatch
from plait.report.text import embedded_json, percent, plot_text, points
from plait.stages import Silent

Result = Evaluation | Comparison | Sweep
TASKS = ["digits", "letters", "flowers", "birds", "cars", "signs", "maps", "rocks"]
HOSTILE = [
    "<script>alert(1)</script>", "</script><img src=x onerror=alert(2)>", "<b>bold</b> &amp; %{x} $a$",
    '" onmouseover="alert(3)', "@ink\u202egnp.exe", "<a href='javascript:alert(4)'>x</a>",
]  # fmt: skip


@pytest.fixture(scope="module")
def inspection(llama: dict[str, Path]) -> dict[str, Any]:
    """Of three real experts."""
    models = [{"model": str(llama[name]), "name": name} for name in ("one", "three", "two")]
    plan = plait.make_plan(
        plait.load_recipe({"merge_method": "average", "base_model": str(llama["base"]), "models": models})
    )
    return inspect_plan(plan, Engine(threads=1, memory=10**8, device="cpu", progress=Silent()))


@pytest.fixture(scope="module")
def everything(inspection: dict[str, Any]) -> list[Result]:
    """8 tasks, 10 merges of which two learned, experts and base, an inspection, and all kinds of sweeps."""
    return [
        comparison(TASKS, inspection=inspection),
        sweep_over(TASKS, {"parameters.weight": [0.1, 0.2, 0.3, 0.4, 0.6]}),
        sweep_over(TASKS, {"merge_method": ["ties", "average"]}),
        sweep_over(TASKS, {"parameters.weight": [0.2, 0.4], "parameters.density": [0.1, 0.5, 0.9]}),
        sweep_of_experts(TASKS, subsets=3),
    ]


def hostile_results(inspection: dict[str, Any]) -> list[Result]:
    names = HOSTILE[:3]
    renamed = json.loads(json.dumps(inspection))
    for old, new in zip(inspection["tasks"], names, strict=True):
        for part in (renamed["overall"], *renamed["tensors"].values()):
            for key in ("norm", "relative_norm"):
                part[key][new] = part[key].pop(old)
    renamed["tasks"] = names
    renamed["tensors"] = {  # two stacks, so that their names are shown
        name.replace("model.layers", stack): part
        for stack in ("encoder.<i>block</i>", "decoder.</script>")
        for name, part in renamed["tensors"].items()
    }
    data = comparison(HOSTILE, methods=HOSTILE, inspection=renamed).model_dump(by_alias=True)
    data["machine"] = data["suite"]["name"] = HOSTILE[1]
    for row in data["rows"]:
        row["data"] = HOSTILE[0]
        if row["kind"] == "merge":
            row["learned"] = learned(HOSTILE, masked=True, layers=2, stack=f"{HOSTILE[1]}.")
            row["learned"].update(objective=HOSTILE[2], split=HOSTILE[0], fit={HOSTILE[0]: HOSTILE[3], "init": 0.3})
            row["learned"]["summary"].update(verdict=HOSTILE[1], more_confident_than_the_expert=HOSTILE)
        row["evaluation"]["model"].update(path=HOSTILE[1], fingerprint=HOSTILE[3])
        row["evaluation"]["protocol"].update(dtype=HOSTILE[0], device=HOSTILE[3])
        row["evaluation"]["versions"] = {HOSTILE[0]: HOSTILE[1]}
        for result in row["evaluation"]["tasks"].values():
            result["metric"] = HOSTILE[1]
    axes = {f"parameters.{HOSTILE[0]}": [0.1, 0.2], HOSTILE[1]: [HOSTILE[0], HOSTILE[3]]}
    return [
        Comparison.model_validate(data),
        sweep_over(HOSTILE, {HOSTILE[0]: [0.1, 0.2, 0.3]}), sweep_over(HOSTILE, axes), sweep_of_experts(HOSTILE, 2),
    ]  # fmt: skip


class Reader(html.parser.HTMLParser):
    """Elements, attributes and text of a page, as a browser would split them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.words: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") or tag

    def handle_data(self, data: str) -> None:
        self.texts[self._inside] = self.texts.get(self._inside, "") + data
        if self._inside not in ("script", "style", "figures", "plotly"):
            self.words.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def ids(self) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get("id"))]


def figures_of(text: str) -> list[dict[str, Any]]:
    return json.loads(Reader(text).texts["figures"])


def sections_of(text: str) -> list[str]:
    tags = Reader(text).tags
    return [attrs["id"] or "" for tag, attrs in tags if tag == "section"]


def test_a_comparison_with_sweeps_has_every_section(everything: list[Result]) -> None:
    text = render(everything, title="Eight in one", provenance={"command": "plait compare"})
    assert sections_of(text) == ["scores", "tasks", "vectors", "learned", "costs", "sweeps", "recipes", "provenance"]
    assert len(figures_of(text)) == 1 + 4 + 5 + 6 + 1 + 4
    said = " ".join(Reader(text).words)
    for word in [*TASKS, *METHODS, "Eight in one", "2 cores, 8 GB, no GPU", "plait compare", "5e5e5e5e5e5e5e5e"]:
        assert word in said.replace("_ ", "_"), word
    best = gather(everything).boards[0].best
    assert best is not None
    assert f"{percent(best.evaluation.average.value)}\u00a0%" in said.replace(" %", "\u00a0%")


def test_the_table_holds_every_number(everything: list[Result]) -> None:
    found = everything[0]
    assert isinstance(found, Comparison)
    text = render([found])
    rows = re.findall(r"<tr>(?:(?!</tr>).)*</tr>", text, re.DOTALL)
    for row in found.rows:
        line = next(r for r in rows if f'data-v="{row.label}"' in r)
        for result in row.evaluation.tasks.values():
            assert f'data-v="{result.score.value:.6f}"' in line
            assert f"{percent(result.score.low)} to {percent(result.score.high)}" in line
        if row.difference:
            assert points(row.difference.value) in line
            assert ("***" in line) == (row.difference.p < 0.001)
    models = re.search(r'<tbody class="models">.*?</tbody>', text, re.DOTALL)
    assert models
    order = [float(v) for v in re.findall(r'<td class="main[^"]*" data-v="([\d.]+)"', models[0])]
    assert order == sorted(order, reverse=True)
    assert text.count('<td class="main best"') == 1


def test_what_has_no_data_is_left_out(everything: list[Result], tmp_path: Path) -> None:
    found = everything[0]
    assert isinstance(found, Comparison)
    bare = found.model_copy(update={"inspection": None, "rows": found.rows[:3]})
    assert sections_of(render([bare])) == ["scores", "tasks", "recipes", "provenance"]
    alone = found.rows[3].evaluation
    text = render([alone])
    assert sections_of(text) == ["scores", "tasks", "provenance"]
    assert "vs baseline" not in text
    assert "merge time" not in text
    assert "fit time" not in text
    assert sections_of(render(everything[1:2])) == ["sweeps", "recipes", "provenance"]
    (tmp_path / "one.json").write_text(dump(alone))
    assert render([load(tmp_path / "one.json")]) == text


def test_evaluations_of_one_suite_share_a_table(everything: list[Result]) -> None:
    found = everything[0]
    assert isinstance(found, Comparison)
    first, second = found.rows[3].evaluation, found.rows[4].evaluation
    (board,) = gather([first, second, first]).boards
    assert [row.evaluation for row in board.rows] == [first, second]
    (board,) = gather([found, first]).boards
    assert len(board.rows) == len(found.rows), "a model that is in the comparison already is not shown twice"
    other = second.model_copy(update={"suite": second.suite.model_copy(update={"fingerprint": "other", "name": "b"})})
    text = render([first, other])
    assert sections_of(text)[:4] == ["scores-1", "tasks-1", "scores-2", "tasks-2"]
    assert len(set(Reader(text).ids())) == len(Reader(text).ids())


def test_results_without_anything_in_them(everything: list[Result]) -> None:
    found = everything[0]
    assert isinstance(found, Comparison)
    render([found.model_copy(update={"rows": []})])
    render([found.rows[0].evaluation.model_copy(update={"tasks": {}, "normalised": None})])
    render([sweep_of_experts(TASKS).model_copy(update={"points": []})])
    with pytest.raises(RecipeError, match="at least one result"):
        render([])


def test_same_results_same_bytes() -> None:
    script = (
        "import hashlib; from report_results import *; from plait.report import render\n"
        "t = ['a', 'b', 'c']; r = [comparison(t), sweep_over(t, {'x': [1, 2]}), sweep_of_experts(t)]\n"
        "print(hashlib.sha256(render(r).encode()).hexdigest())"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", script], check=True, capture_output=True, text=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent)},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(hashes) == 1


def test_hostile_names_stay_text(inspection: dict[str, Any]) -> None:
    text = render(hostile_results(inspection), title=HOSTILE[0], provenance={HOSTILE[0]: HOSTILE[1]})
    reader = Reader(text)
    scripts = [attrs for tag, attrs in reader.tags if tag == "script"]
    assert [attrs.get("type") for attrs in scripts] == [None, "application/json", "application/octet-stream", None]
    assert not {tag for tag, _ in reader.tags} & {"img", "iframe", "object", "form", "base"}
    assert all(attrs["href"] and attrs["href"].startswith("#") for tag, attrs in reader.tags if tag == "a")
    assert not [name for _, attrs in reader.tags for name in attrs if name.startswith("on")]
    assert "\u202e" not in text
    for word in strings(figures_of(text)):
        bare = re.sub(r"</?b>|<br>", "", word)
        assert "<" not in bare, word
        assert not re.search(r"&(?!(amp|lt|gt);)", bare), word
    policy = next(attrs["content"] for tag, attrs in reader.tags if tag == "meta" and attrs.get("http-equiv"))
    assert policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.split("style-src")[0]


def strings(data: Any) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    for item in data.values() if isinstance(data, dict) else data if isinstance(data, list) else []:
        yield from strings(item)


def test_text_for_plotly_and_for_scripts() -> None:
    assert plot_text("<b>&</b>\n x") == "&lt;b&gt;&amp;&lt;/b&gt; x"
    assert plot_text("a" * 50, 10) == "a" * 9 + "…"
    written = embedded_json({"a": ["</script>", "<!--", "\u2028", math.nan, 0.1 + 0.2]})
    assert "<" not in written
    assert "\u2028" not in written
    assert json.loads(written) == {"a": ["</script>", "<!--", "\u2028", None, 0.3]}
    assert (percent(0.8734), percent(-0.01), percent(None), points(0.018)) == ("87.3", "−1.0", "–", "+1.8")
    assert (percent(-0.0001), points(-0.0001), points(0.0)) == ("0.0", "0.0", "0.0")


def test_figures_are_what_plotly_knows(everything: list[Result], inspection: dict[str, Any]) -> None:
    from plotly.graph_objects import Figure  # checks every key and value

    for results in (everything, hostile_results(inspection)):
        for figure in figures_of(render(results)):
            text = re.sub(r'"(color|\w+color)":"@[\w/]+"', r'"\1":"#123456"', json.dumps(figure, separators=(",", ":")))
            plain = json.loads(re.sub(r"\[([\d.]+),\"@\w+\"\]", r'[\1,"#123456"]', text))
            Figure(data=plain["data"], layout=plain["layout"])


def test_depth_is_read_off_the_names(inspection: dict[str, Any]) -> None:
    found = read_inspection(inspection)
    assert found is not None
    levels = by_depth(found.tensors)
    assert [level.label for level in levels] == ["before", "0", "1", "2", "after"]
    layer = [part for name, part in inspection["tensors"].items() if ".layers.1." in name]
    want = math.sqrt(sum(part["norm"]["two"] ** 2 for part in layer))
    assert levels[2].norm("two") == pytest.approx(want)
    shared = [part for part in layer if part["norm"]["one"] and part["norm"]["two"]]
    assert 0 < len(shared) < len(layer), "some tensor of this layer was left alone by an expert"
    heavy = [part["changed"] * part["parameters"] for part in shared]
    want = sum(p["sign_agreement"][0][2] * n for p, n in zip(shared, heavy, strict=True)) / sum(heavy)
    assert levels[2].agreement(found.tasks, 0, 2) == pytest.approx(want)


def test_encoder_before_decoder() -> None:
    part = {"parameters": 4, "base_norm": 1.0, "norm": {"a": 1.0}, "cosine": [[1.0]], "sign_agreement": [[1.0]],
            "unanimous": 1.0, "changed": 1.0}  # fmt: skip
    names = ["decoder.block.0.w", "decoder.block.1.w", "encoder.block.0.w", "encoder.block.1.w", "shared.w", "lm.w"]
    found = read_inspection({"tasks": ["a"], "overall": part, "tensors": dict.fromkeys(names, part)})
    assert found is not None
    assert [f"{level.stack}{level.label}" for level in by_depth(found.tensors)] == [
        "before", "encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1", "after",
    ]  # fmt: skip


def test_an_inspection_that_is_none_is_refused(everything: list[Result], inspection: dict[str, Any]) -> None:
    found = everything[0]
    for broken in ({"tasks": ["a"]}, {**inspection, "tasks": ["a", "b"]}, {**inspection, "overall": {"norm": "<"}}):
        with pytest.raises(CheckpointError, match=r"inspection.*run plait compare again"):
            render([found.model_copy(update={"inspection": broken})])


def test_what_was_learned_is_told(everything: list[Result]) -> None:
    found = everything[0]
    assert isinstance(found, Comparison)
    text = render([found])
    said = " ".join(Reader(text).words)
    for words in (
        "The guard ended the fit after 60 steps: agreement with the experts fell from 82\u00a0% to 71\u00a0%, though "
        "the loss went on falling. Kept is step 35, where agreement was best.",
        "The mask took 60 steps, the coefficients came after it.", "kept is step 95, where agreement was best",
        "3200 unlabeled inputs of the adapt split (400 of each of 8 tasks)", "3 min 12 s", "21 min 00 s", "fit time",
    ):  # fmt: skip
        assert words in said, words
    row = next(row for row in found.rows if row.label == "concrete_adamerging")
    assert row.learned is not None
    heats = [figure for figure in figures_of(text) if figure["data"][0]["type"] == "heatmap"]
    names, runs = in_depth(row.learned["coefficients"])
    assert heats[-2]["data"][0]["z"] == [
        pytest.approx([row.learned["coefficients"][name][k] for name in names], abs=1e-6) for k in range(len(TASKS))
    ]
    assert heats[-1]["data"][0]["z"][1] == pytest.approx(
        [row.learned["masks"][name]["under_0.5"] for name in names], abs=1e-6
    )
    assert [run.label for run in runs] == ["before", *map(str, range(12)), "after"]


def test_a_fit_that_knows_little(everything: list[Result]) -> None:
    found = everything[0]
    assert isinstance(found, Comparison)

    def figures(**update: Any) -> list[dict[str, Any]]:
        row = found.rows[-1].model_copy(update={"learned": {**learned(TASKS), **update}})
        return figures_of(render([found.model_copy(update={"rows": [row], "inspection": None})]))[1:]

    pairs = {"loss": [3.0, 2.0, 1.5], "checks": []}
    assert len(figures(history=pairs, summary={"steps_taken": 3})) == 2, "loss and coefficients"
    assert len(figures(history={}, summary={})) == 1
    assert not figures(history={}, summary={}, coefficients={}, data={}, fit={})
    row = found.rows[-1].model_copy(update={"learned": {"tasks": TASKS, "history": {}, "summary": {"agreement": 0.81}}})
    closed = render([found.model_copy(update={"rows": [row]})])
    assert "It agrees with the experts on 81.0\u00a0% of the inputs" in closed
    start = {"kept_step": 0, "steps_taken": 60}
    row = found.rows[-1].model_copy(update={"learned": {**learned(TASKS), "summary": start}})
    assert "kept is the start, as no later step agreed better" in render([found.model_copy(update={"rows": [row]})])
    same = {"encoder.layer.0": [0.3] * 8, "encoder.layer.1": [0.3] * 8}
    assert not figures(history={}, coefficients=same), "nothing moved: a field of one colour"
    one = figures(history={}, coefficients={"all": [0.1 * k for k in range(8)]})[0]
    assert one["layout"]["xaxis"]["ticktext"] == ["all tensors"]
    assert one["data"][0]["text"] == [[f"0.{k}0"] for k in range(8)]
    top = figures(history={}, coefficients={f"encoder.layer.{i}.w": [0.1 * i] * 8 for i in (10, 9, 11)})[0]
    assert top["layout"]["xaxis"]["ticktext"] == ["9", "10", "11"], "layers below were not trained"
    layers = figures(history={}, coefficients={f"encoder.layer.{i}": [0.1 * i] * 8 for i in range(11)})[0]
    assert layers["layout"]["xaxis"]["ticktext"] == [str(i) for i in range(11)]
    test = render([found.model_copy(update={"rows": [
        found.rows[-1].model_copy(update={"learned": {**learned(TASKS), "split": "test"}})
    ]})])  # fmt: skip
    assert "they are the inputs that scores are measured on" in test


def test_a_fit_that_is_none_is_refused(everything: list[Result]) -> None:
    found = everything[0]
    assert isinstance(found, Comparison)
    whole = learned(TASKS)
    for broken in (
        {"tasks": 3}, {**whole, "coefficients": {"all": [0.1]}}, {**whole, "history": {"loss": ["<"]}},
        {**whole, "tasks": ["a"], "coefficients": {}},
    ):  # fmt: skip
        row = found.rows[-1].model_copy(update={"learned": broken})
        with pytest.raises(CheckpointError, match=r"learned.*run plait compare again"):
            render([found.model_copy(update={"rows": [row]})])


def test_a_file_appears_whole_or_not_at_all(everything: list[Result], tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "report.html"
    assert write_report(everything[1:2], out) == out
    before = out.read_text(encoding="utf-8")
    assert before == render(everything[1:2])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(MachineError, match=r"report\.html.*No space left"):
            write_report(everything, out)
    assert out.read_text(encoding="utf-8") == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(MachineError, match="No such file or directory"):
        write_report(everything[1:2], tmp_path / "missing" / "report.html")


def test_without_plotly_it_says_what_to_install(everything: list[Result], monkeypatch: Any) -> None:
    page_module._plotly.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MachineError, match=r'pip install "plait\[eval\]"'):
        render(everything)
    page_module._plotly.cache_clear()


def test_every_series_has_a_mark_of_its_own() -> None:
    marks = [symbol(i) for i in range(20)]
    assert len(set(marks)) == 20
    drawn = {swatch(Key("a", (0,), "@c0", name)) for name in marks}
    assert len(drawn) == 20
    assert len(SYMBOLS) == 10


def test_colours_have_contrast() -> None:
    style = page_module._packaged("style.css")
    pairs = dict(re.findall(r"--(\w+): light-dark\((#\w{6}, #\w{6})\)", style))
    for theme in (0, 1):
        shades = {name: luminance(both.split(", ")[theme]) for name, both in pairs.items()}

        def contrast(a: str, b: str, shades: dict[str, float] = shades) -> float:
            high, low = sorted((shades[a], shades[b]), reverse=True)
            return (high + 0.05) / (low + 0.05)

        for ground in ("page", "raised", "band", "good"):
            assert contrast("ink", ground) > 7
            assert contrast("soft", ground) > 4.5
            assert contrast("accent", ground) > 4.5
        assert min(contrast("ink", "heat"), contrast("ink", "cool")) > 4.5
        assert min(contrast(f"c{i}", ground) for i in range(10) for ground in ("raised", "band")) > 3


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# ---- In a browser

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: figures are not drawn in this test run")

LOOK = """(() => {
  const plots = [...document.querySelectorAll('.plot')].map((plot) => {
    const box = plot.getBoundingClientRect();
    const outside = [...plot.querySelectorAll('.main-svg text')].filter((text) => {
      const at = text.getBoundingClientRect();
      return at.width && (at.left < box.left - 1 || at.right > box.right + 1 || at.bottom > box.bottom + 1
                         || at.top < box.top - 1);
    }).map((text) => text.textContent);
    return {traces: plot.querySelectorAll('.scatterlayer .trace, .heatmaplayer .hm').length, wanted: plot.data.length,
            ink: getComputedStyle(plot.querySelector('.xtick text')).fill, outside};
  });
  return {plots, page: document.scrollingElement.scrollWidth, window: innerWidth,
          images: [...document.images].length, ready: !!window.Plotly};
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as made:
        yield made


def look(browser: Browser, count: int, width: int) -> str:
    """Check that every figure is drawn whole in the window as it is; returns the colour of its words."""
    seen = browser.run(LOOK)
    assert len(seen["plots"]) == count
    for place, plot in enumerate(seen["plots"]):
        assert plot["traces"] == plot["wanted"] > 0, f"figure {place} is not drawn whole"
        assert not plot["outside"], f"figure {place} cuts words off at {width}"
    assert seen["page"] <= seen["window"] == width, "the page itself must not scroll sideways"
    assert seen["images"] == 0
    return seen["plots"][0]["ink"]


@needs_browser
@pytest.mark.parametrize("kind", ["plain", "hostile"])
def test_a_browser_draws_every_figure(
    kind: str, browser: Browser, everything: list[Result], inspection: dict[str, Any], tmp_path: Path
) -> None:
    results = everything if kind == "plain" else hostile_results(inspection)
    path = write_report(results, tmp_path / "report.html")
    count = len(figures_of(path.read_text(encoding="utf-8")))
    browser.said.clear()
    browser.asked.clear()
    browser.show(path, 1280, scheme="light")
    light = look(browser, count, 1280)
    browser.window(390, scheme="light")
    assert look(browser, count, 390) == light
    browser.window(390, scheme="dark")
    assert look(browser, count, 390) != light
    assert browser.said == []
    assert {url for url in browser.asked if not url.startswith("data:")} == {path.as_uri()}


@needs_browser
def test_buttons_and_paper(browser: Browser, everything: list[Result], tmp_path: Path) -> None:
    path = write_report(everything, tmp_path / "report.html")
    browser.said.clear()
    browser.show(path, 1280, scheme="dark")
    dark = look(browser, len(figures_of(path.read_text(encoding="utf-8"))), 1280)
    ink = "getComputedStyle(document.querySelector('.xtick text')).fill"
    press = "document.getElementById('theme').click()"
    browser.run(press)
    light = browser.run(ink)
    assert light != dark
    assert browser.run("getComputedStyle(document.body).colorScheme") == "light"
    browser.run(press)
    assert browser.run(ink) == dark
    assert browser.run("getComputedStyle(document.body).colorScheme") == "dark"

    shown = "document.querySelectorAll('#plot-0 .scatterlayer .trace').length"
    all_of_them = browser.run(shown)
    for less in (1, 0):
        browser.run("document.querySelectorAll('.key')[1].click()")
        assert browser.run(shown) == all_of_them - less

    column = "[...document.querySelectorAll('.scores .models tr')].map((r) => Number(r.cells[4].dataset.v))"
    press = "document.querySelectorAll('.scores .sort')[4].click()"
    browser.run(press)
    down = browser.run(column)
    browser.run(press)
    up = browser.run(column)
    assert down == sorted(down, reverse=True)
    assert up == sorted(up) == down[::-1]
    assert len(up) == len(METHODS)
    assert browser.run("getComputedStyle(document.querySelector('.range')).display") == "none"
    browser.run("document.querySelector('.show-intervals').click()")
    assert browser.run("getComputedStyle(document.querySelector('.range')).display") == "block"

    # Paper is light whatever the screen is, shows the recipes, and no figure is taller than a page.
    browser.call("Emulation.setEmulatedMedia", media="print")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run(ink) == light
    assert browser.run("document.querySelectorAll('.recipe:not([open])').length") == 0
    assert browser.run("getComputedStyle(document.querySelector('.bar')).display") == "none"
    assert browser.run("getComputedStyle(document.querySelector('figure')).backgroundColor") == "rgb(255, 255, 255)"
    tall = browser.run("Math.max(...[...document.querySelectorAll('figure')].map((f) => f.offsetHeight))")
    assert tall < 640, "a figure and its heading must fit on a page"
    browser.call("Emulation.setEmulatedMedia", media="")
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run(ink) == dark
    assert browser.run("document.querySelectorAll('.recipe[open]').length") == 0
    assert browser.said == []
