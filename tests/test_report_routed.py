"""Where routed models sent their inputs: in the report, in the tables, as CSV. Results are made up; no model is run."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pydantic
import pytest
from report_browser import CHROMIUM, Browser
from report_results import comparison, evaluation
from rich.console import Console
from test_report import HOSTILE, LOOK, Reader, figures_of, sections_of, strings

from plait.errors import CheckpointError
from plait.evaluate.results import Comparison, Evaluation, Robustness, Routing, dump, load
from plait.evaluate.tables import comparison_csv, comparison_markdown, comparison_tables, result_tables
from plait.report import render, write_report

TASKS = ["maps", "cars", "rocks"]
EXPERTS = ["cars", "maps", "rocks"]
ONE = Routing(
    experts=EXPERTS, routes=["model"],
    weights={"maps": [[0.25, 0.7, 0.05]], "cars": [[0.5, 0.3, 0.2]], "rocks": [[0.0, 0.02, 0.98]]},
    chosen={"maps": [30, 264, 6], "cars": [150, 90, 60], "rocks": [0, 0, 300]},
    right={"maps": 0.88, "cars": 0.5, "rocks": 1.0}, blind={"maps": 0.8, "cars": 0.4, "rocks": 0.9},
)  # fmt: skip
SCORES = {"maps": 0.9, "cars": 0.75, "rocks": 0.9}
"""Their average is 85 %; blind it is 70 %."""


def deep(tasks: Sequence[str], layers: int, start: float = 0.3) -> Routing:
    """A router that tells tasks apart more and more surely from layer to layer; the last task is mistaken most."""
    experts, last = sorted(tasks), tasks[-1]
    weights, chosen, right, blind = {}, {}, {}, {}
    for place, task in enumerate(tasks):
        own = experts.index(task)
        sure = 0.9 - 0.05 * place
        rise = [start + (sure - start) * (i + 1) / layers for i in range(layers)]
        rest = [(1 - value) / max(len(tasks) - 1, 1) for value in rise]
        weights[task] = [
            [value if k == own else other for k in range(len(experts))] for value, other in zip(rise, rest, strict=True)
        ]
        wrong = 2 * place + (30 if task == last else 0)
        counts = [0] * len(experts)
        counts[own], counts[own - 1] = 300 - wrong, wrong
        chosen[task], right[task] = counts, (300 - wrong) / 300
        blind[task] = 0.6 * right[task]  # the made-up scores are above that
    return Routing(
        experts=experts, routes=[f"group {i}" for i in range(layers)], weights=weights, chosen=chosen, right=right,
        blind=blind,
    )  # fmt: skip


def routed(routing: Routing | None = ONE, label: str = "twin") -> Evaluation:
    made = evaluation(label, SCORES, dict.fromkeys(SCORES, 0.95))
    return made.model_copy(update={"routing": routing})


def compared(*routings: Routing | None, tasks: Sequence[str] = TASKS) -> Comparison:
    """Experts, base and a merge for each of these."""
    found = comparison(tasks, methods=[f"method {i}" for i in range(len(routings))])
    rows = [
        row.model_copy(update={"evaluation": row.evaluation.model_copy(update={"routing": routing})})
        for row, routing in zip(found.rows, (None, None, *routings), strict=True)
    ]
    return found.model_copy(update={"rows": rows})


def section(text: str) -> str:
    found = re.search(r'<section id="routed[^>]*>.*?</section>', text, re.DOTALL)
    assert found
    return found[0]


def words(text: str) -> str:
    return " ".join(Reader(section(text)).words).replace("\u00a0", " ")


def drawn(text: str) -> list[dict[str, Any]]:
    """The figures of the section."""
    numbers = [int(number) for number in re.findall(r'id="plot-(\d+)"', section(text))]
    return [figures_of(text)[number] for number in numbers]


# ---- The page


def test_the_section_is_there_only_for_routed_models() -> None:
    assert "routed" not in sections_of(render([routed(None)]))
    assert "routed" not in sections_of(render([compared(None, None)]))
    assert "routed, %" not in render([compared(None, None)])
    assert "routed" in sections_of(render([routed()]))
    text = render([compared(ONE, None)])
    assert "routed" in sections_of(text)
    assert "routed, %" in text
    assert words(text).count("Each sample's heaviest expert") == 1, "only the routed one of two models"
    clean = Robustness(clean=routed(), corrupted=[])
    assert "routed" in sections_of(render([clean]))


def test_cells_are_the_shares_of_samples() -> None:
    first, second = drawn(render([routed()]))
    (trace,) = first["data"]
    assert first["layout"]["yaxis"]["ticktext"] == TASKS
    assert first["layout"]["xaxis"]["ticktext"] == TASKS, "a task's own expert is on the diagonal"
    assert trace["z"] == [[0.88, 0.1, 0.02], [0.3, 0.5, 0.2], [0, 0, 1]]
    assert trace["text"] == [["88.0", "10.0", "2.0"], ["30.0", "50.0", "20.0"], ["", "", "100.0"]]
    assert "30.0 %, 90 of 300 samples" in trace["hovertext"][1][0]
    frames = [(shape["x0"], shape["y0"]) for shape in first["layout"]["shapes"]]
    assert frames == [(-0.5, -0.5), (0.5, 0.5), (1.5, 1.5)]
    assert second["data"][0]["text"] == [["0.70", "0.25", "0.05"], ["0.30", "0.50", "0.20"], ["0.02", "0.00", "0.98"]]


def test_the_sentence_says_how_often_rightly_and_what_it_costs() -> None:
    said = words(render([routed()]))
    assert "79.3 % of the samples (mean over tasks) have their own task's expert as the heaviest" in said
    assert "those of cars least often (50.0 %)" in said
    assert "would be 70.0 % instead of 85.0 %: mis-routing costs 15.0 points." in said
    assert "Most often samples of cars go to the expert of maps (30.0 %)." in said
    assert "In the mean over tasks, the own expert weighs 0.73." in said

    some = ONE.model_copy(update={"blind": {"maps": 0.8}})
    assert "the average over 1 task would be 80.0 % instead of 90.0 %" in words(render([routed(some)]))
    said = words(render([routed(ONE.model_copy(update={"blind": {}}))]))
    assert "mis-routing" not in said
    assert "those of cars least often (50.0 %)." in said
    free = ONE.model_copy(update={"blind": SCORES})
    assert "85.0 % instead of 85.0 %: mis-routing costs nothing." in words(render([routed(free)]))


def test_layers_are_shown_in_order_with_what_the_others_get() -> None:
    weights = {
        "maps": [[0.2, 0.3, 0.1], [0.05, 0.9, 0.15]],
        "cars": [[0.5, 0.1, 0.3], [0.7, 0.2, 0.0]],
        "rocks": [[0.4, 0.2, 0.4], [0.1, 0.1, 0.8]],
    }
    two = ONE.model_copy(update={"routes": ["group 2", "group 10"], "weights": weights})
    _, figure = drawn(render([routed(two)]))
    (trace,) = figure["data"]
    assert figure["layout"]["yaxis"]["ticktext"] == [*TASKS, "other experts"]
    assert figure["layout"]["xaxis"]["ticktext"] == ["2", "10"]
    assert trace["z"] == [[0.3, 0.9], [0.5, 0.7], [0.4, 0.8], [pytest.approx(0.216667), pytest.approx(0.1)]]
    assert trace["text"][0] == ["0.30", "0.90"]
    assert "each other, in the mean: 0.15" in trace["hovertext"][0][0]
    assert trace["zmin"] == 0
    said = words(render([routed(two)]))
    assert "weighs most in group 10 (0.80 in the mean, another's 0.10)" in said
    assert "least in group 2 (0.40, another's 0.22)" in said

    weights["cars"][0][0] = -0.2
    _, figure = drawn(render([routed(two)]))
    assert (figure["data"][0]["zmin"], figure["data"][0]["zmax"]) == (-0.9, 0.9), "zero is the middle of the colours"
    assert figure["data"][0]["text"][1][0] == "−0.20"


def test_tasks_without_an_expert() -> None:
    experts = Routing(
        experts=["cars", "maps"], routes=["model"],
        weights={"maps": [[0.1, 0.9]], "cars": [[0.8, 0.2]], "rocks": [[0.6, 0.4]]},
        chosen={"maps": [0, 300], "cars": [300, 0], "rocks": [200, 100]}, right={"maps": 1.0, "cars": 1.0},
        blind={"maps": 0.9, "cars": 0.75},
    )  # fmt: skip
    text = render([routed(experts)])
    said = words(text)
    assert "100.0 % of the samples (mean over tasks) have their own" in said
    assert "least often" not in said
    assert "over 2 tasks would be 82.5 % instead of 82.5 %" in said
    assert "Without an expert of their own, rocks mostly goes to cars." in said
    assert len(drawn(text)[0]["layout"]["shapes"]) == 2
    none = experts.model_copy(update={"experts": ["x", "y"], "right": {}, "blind": {}})
    assert "No task has an expert in this model" in words(render([routed(none)]))
    empty = experts.model_copy(update={"chosen": {}, "weights": {}, "right": {}, "blind": {}})
    assert "routed" not in sections_of(render([routed(empty)]))


def test_names_stay_text() -> None:
    plain = words(render([compared(deep(["<b>", "a"], 3), tasks=["<b>", "a"])]))
    assert "those of a least often" in plain
    assert "Most often samples of a go to the expert of <b>" in plain
    for layers in (1, 4):
        found = deep(HOSTILE, layers)
        found = found.model_copy(update={"routes": [f"{HOSTILE[0]} {i} {HOSTILE[1]}" for i in range(layers)]})
        board = compared(found, tasks=HOSTILE)
        rows = [*board.rows[:-1], board.rows[-1].model_copy(update={"label": HOSTILE[0]})]
        text = render([board.model_copy(update={"rows": rows})])
        tags = Reader(section(text)).tags
        assert not {tag for tag, _ in tags} & {"img", "script", "b", "a"}
        assert not [name for _, attrs in tags for name in attrs if name.startswith("on")]
        for word in strings(drawn(text)):
            assert "<" not in re.sub(r"</?b>|<br>", "", word), word
        names = drawn(text)[0]["layout"]["yaxis"]["ticktext"]
        assert names[2].startswith("&lt;b&gt;bold"), "no markup for plotly"
        assert sum(word.count("<b>bold") for word in strings(drawn(text))) == 0


def test_figures_are_what_plotly_knows() -> None:
    from plotly.graph_objects import Figure  # checks every key and value

    for routing in (ONE, deep(TASKS, 5), deep([f"task {i}" for i in range(24)], 20)):
        tasks = list(routing.weights)
        for figure in drawn(render([compared(routing, tasks=tasks)])):
            plain = json.loads(re.sub(r'"@\w+"', '"#123456"', json.dumps(figure)))
            Figure(data=plain["data"], layout=plain["layout"])


def test_routing_that_does_not_hold_together_is_refused(tmp_path: Path) -> None:
    for change in (
        {"experts": ["cars"]}, {"chosen": {"maps": [1, 2, 3]}}, {"weights": {}}, {"right": {"birds": 1.0}},
        {"blind": {"maps": 0.5}, "right": {}}, {"routes": []}, {"chosen": {**ONE.chosen, "cars": [1, 2]}},
    ):  # fmt: skip
        with pytest.raises(pydantic.ValidationError, match=r"must have"):
            Routing.model_validate(ONE.model_dump() | change)
    (tmp_path / "good.json").write_text(dump(routed()))
    assert load(tmp_path / "good.json") == routed()
    (tmp_path / "bad.json").write_text(dump(routed(ONE.model_copy(update={"routes": ["a", "b"]}))))
    with pytest.raises(CheckpointError, match=r"routing: .*weights must have a number for every route and expert"):
        load(tmp_path / "bad.json")


# ---- Tables


def shown(found: Any) -> list[str]:
    console = Console(width=200, file=io.StringIO(), record=True)
    for table in found:
        console.print(table)
    return console.export_text().splitlines()


def test_eval_prints_how_the_routing_went() -> None:
    assert len(result_tables(routed(None))) == 1
    lines = shown(result_tables(routed())[1:])
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines]
    assert "twin" in lines[0]
    assert cells[1] == ["task", "rightly routed", "blind"]
    assert cells[2:6] == [
        ["maps", "88.0", "80.0"], ["cars", "50.0", "40.0"], ["rocks", "100.0", "90.0"], ["average", "79.3", "70.0"],
    ]  # fmt: skip
    unknown = ONE.model_copy(update={"right": {"maps": 0.88}, "blind": {}})
    assert "cars - -" in [" ".join(line.split()) for line in shown(result_tables(routed(unknown))[1:])]
    assert len(result_tables(Robustness(clean=routed(), corrupted=[]))) == 2


def test_compare_has_a_column_where_some_model_is_routed() -> None:
    assert not [line for line in comparison_markdown(compared(None)).splitlines() if "routed" in line]
    lines = [line for line in comparison_markdown(compared(None, ONE)).splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    at = rows[0].index("routed")
    assert [row[at] for row in rows[2:]] == ["-", "-", "-", "79.3"]
    assert {len(row) for row in rows} == {len(rows[0])}
    scores, costs = comparison_tables(compared(None, ONE))
    assert [column.header for column in scores.columns][-1] == "routed"
    assert [column.header for column in costs.columns] == [
        "model",
        "fit",
        "merge",
        "size",
        "latency",
        "data",
        "task id",
    ]
    assert "routed: share of the samples" in str(scores.caption)
    assert "routed" not in str(comparison_tables(compared(None))[0].caption)


def test_the_csv_has_two_columns_more() -> None:
    assert "routed" not in comparison_csv(compared(None)).splitlines()[0].split(",")
    rows = list(csv.DictReader(io.StringIO(comparison_csv(compared(None, ONE)))))
    assert [row["routed"] for row in rows[:3]] == ["", "", ""]
    assert float(rows[3]["routed"]) == pytest.approx(2.38 / 3)
    assert float(rows[3]["blind"]) == pytest.approx(0.7)
    assert rows[3]["task_id"] == "head"


def test_latency_is_told_and_drawn_where_some_model_is_routed() -> None:
    rows = list(csv.DictReader(io.StringIO(comparison_csv(compared(None, ONE)))))
    assert {row["latency_seconds"] for row in rows} == {"0.0042"}
    lines = [line for line in comparison_markdown(compared(None)).splitlines() if line.startswith("|")]
    at = [cell.strip() for cell in lines[0].split("|")].index("latency")
    assert {line.split("|")[at].strip() for line in lines[2:]} == {"4.2 ms"}
    found = compared(None, ONE, ONE)
    timed = [
        row.model_copy(update={"evaluation": row.evaluation.model_copy(update={"latency": 0.002 * (1 + place)})})
        for place, row in enumerate(found.rows)
    ]
    page = render([found.model_copy(update={"rows": timed})])
    assert "What a better average costs in latency" in page
    assert "What a better average costs in latency" not in render([compared(None, None, None)])


# ---- In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: figures are not drawn in this test run")
@pytest.mark.parametrize("count", [2, 8, 20])
def test_a_browser_draws_the_heat_maps(count: int, browser: Browser, tmp_path: Path) -> None:
    tasks = [f"a rather long task {i}" if i % 3 == 0 else f"task {i}" for i in range(count)]
    one = deep(tasks, 1).model_copy(update={"routes": ["model"]})
    path = write_report([compared(one, deep(tasks, 12), deep(tasks, 24), tasks=tasks)], tmp_path / "report.html")
    browser.said.clear()
    for width, scheme in ((1280, "light"), (390, "dark")):
        browser.show(path, width, scheme=scheme)
        seen = browser.run(LOOK)
        assert len(seen["plots"]) == len(figures_of(path.read_text(encoding="utf-8")))
        assert all(plot["traces"] == plot["wanted"] > 0 for plot in seen["plots"])
        assert not [plot["outside"] for plot in seen["plots"] if plot["outside"]], f"words are cut off at {width}"
        assert seen["page"] <= width
    assert browser.said == []
