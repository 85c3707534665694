"""The measuring verbs of the command line: suite, eval, compare, sweep, report. One function a verb, no logic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from plait.errors import RecipeError

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
SuiteName = Annotated[str, typer.Option("--suite", help="A suite's name, or the path of its YAML file.")]
Tasks = Annotated[list[str] | None, typer.Option("--task", "-t", help="Only this task (may be repeated).")]
Batch = Annotated[int, typer.Option(min=1, help="Samples in a batch; batches mix the tasks.")]
Dtype = Annotated[str, typer.Option(help="Type to compute in: float32, bfloat16, float16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Measure again what was measured before.")]
Corrupt = Annotated[
    str | None,
    typer.Option(help="Also under these: motion, impulse, gaussian, pixelate, spatter, contrast, jpeg (with commas)."),
]
ProtocolName = Annotated[
    str,
    typer.Option(
        help="honest: batches mix the tasks. paper: one task a batch, and a routed model mixes once for all of it."
    ),
]
Severity = Annotated[int | None, typer.Option(help="Of the corruptions: 1 (faint) to 5 (strong). Default: 3.")]
Unseen = Annotated[
    str | None, typer.Option(help="Tasks (with commas) whose experts are not merged: averages of their own.")
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for tables, results and report.")]

suite_app = typer.Typer(help="Suites: real tasks with real experts.", no_args_is_help=True)


@suite_app.command("list")
def suite_list(as_json: Json = False) -> None:
    """List the suites that come with Plait, and which are built on this machine."""
    from plait.evaluate import show

    data = show.suites_data()
    show.emit(data, as_json, lambda: show.suites_text(data))


@suite_app.command("build")
def suite_build(
    name: Annotated[str, typer.Argument(help="vision, text, language, vision-hard or text-hard.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder of the suite's data, where Plait is not a checkout.")
    ] = None,
    task: Tasks = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Experts trained at once. Default: the processors.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Build a suite in the user's cache: base, data, experts. What is there is kept; interrupted builds go on."""
    from plait import progress
    from plait.suites.build import build_suite

    with progress.shown(quiet) as shown:
        folder = build_suite(name, data=data, tasks=task, workers=workers, progress=shown)
    typer.echo(f"{folder / 'suite.yaml'}")


@suite_app.command("show")
def suite_show(
    name: Annotated[str, typer.Argument(help="A suite's name, or the path of its YAML file.")], as_json: Json = False
) -> None:
    """Show a suite: tasks, classes, splits and their sizes; checks that adapt and test are disjoint."""
    from plait.evaluate import show
    from plait.suites.places import load_suite

    data = show.suite_data(load_suite(name))
    show.emit(data, as_json, lambda: show.suite_text(data))


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or hub id: a model, or an adapter of the suite's base.")],
    suite: SuiteName,
    task: Tasks = None,
    corrupt: Corrupt = None,
    severity: Severity = None,
    unseen: Unseen = None,
    protocol: ProtocolName = "honest",
    batch_size: Batch = 64,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    no_cache: NoCache = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure a model on a suite's test splits, beside every task's own expert. Batches mix the tasks."""
    from plait import progress
    from plait.evaluate import results, robust, show, tables
    from plait.evaluate.measure import evaluate as measure
    from plait.suites.places import load_suite

    under = robust.corruptions(show.parts(corrupt), severity)
    with progress.shown(quiet or as_json) as shown:
        options = show.options(batch_size, dtype, device, no_cache, shown, protocol)
        how = {"tasks": task, "unseen": show.parts(unseen), "options": options}
        chosen = load_suite(suite)
        found = robust.robustness(model, chosen, under, **how) if under else measure(model, chosen, **how)
    show.emit_text(results.dump(found), as_json, lambda: show.tables_text(tables.result_tables(found), []))


def compare(
    suite: SuiteName,
    specs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE | MODEL | METHOD]…",
            help="Each may be named: label=recipe.yaml. Methods take parameters: ties:density=0.2,trim=model.",
        ),
    ] = None,
    baseline: Annotated[str, typer.Option(help="The row that others are tested against.")] = "task_arithmetic",
    out: Out = None,
    task: Tasks = None,
    corrupt: Corrupt = None,
    severity: Severity = None,
    unseen: Unseen = None,
    protocol: ProtocolName = "honest",
    batch_size: Batch = 64,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    memory: Annotated[str, typer.Option(help="Bound of a merge's buffers.")] = "512MB",
    no_cache: NoCache = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Merge and measure: one table of methods by tasks, beside experts, base, average and task arithmetic."""
    from plait import progress
    from plait.evaluate import results, robust, show, tables
    from plait.evaluate.compare import Means
    from plait.evaluate.compare import compare as run
    from plait.evaluate.measure import Bench
    from plait.recipe import safe_name
    from plait.suites.places import load_suite

    under = robust.corruptions(show.parts(corrupt), severity)
    chosen = load_suite(suite).only(task)
    folder = out or Path(safe_name(f"comparison-{chosen.name}"))
    with progress.shown(quiet or as_json) as shown:
        options = show.options(batch_size, dtype, device, no_cache, shown, protocol)
        bench = Bench(chosen, options, unseen=show.parts(unseen))
        means = Means(memory=memory, device=device)
        found = run(specs or [], bench, folder, baseline=baseline, means=means, under=under)
        written = show.write_comparison(found, folder)
    show.emit_text(results.dump(found), as_json, lambda: show.tables_text(tables.comparison_tables(found), written))


def sweep(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE | METHOD", help="Recipe file, or a method by name.")],
    suite: SuiteName,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="path=first..last:step or path=a,b,c; twice makes a grid."),
    ] = None,
    experts: Annotated[str | None, typer.Option(help="Numbers of experts, such as 2,4,6: random subsets.")] = None,
    subsets: Annotated[int, typer.Option(min=1, help="Random subsets of every size.")] = 5,
    out: Out = None,
    batch_size: Batch = 64,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    memory: Annotated[str, typer.Option(help="Bound of a merge's buffers.")] = "512MB",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Merge and measure over a grid of settings, or over numbers of experts. Interrupted sweeps go on."""
    from plait import progress
    from plait.evaluate import results, show, tables
    from plait.evaluate.compare import Means
    from plait.evaluate.contenders import contender
    from plait.evaluate.measure import Bench
    from plait.evaluate.sweep import parse_axes
    from plait.evaluate.sweep import sweep as run
    from plait.recipe import safe_name
    from plait.suites.places import load_suite

    if not settings and experts is None:
        raise RecipeError("sweep: say what to change with --set path=values, or --experts 2,4,6")
    chosen = load_suite(suite)
    item = contender(recipe, chosen)
    axes = parse_axes(settings or [])
    sizes = show.sizes(experts)
    folder = out or Path(safe_name(f"sweep-{chosen.name}-{item.slug}"))
    with progress.shown(quiet or as_json) as shown:
        bench = Bench(chosen, show.options(batch_size, dtype, device, False, shown))
        found = run(
            item, axes, bench, folder, sizes=sizes, subsets=subsets, means=Means(memory=memory, device=device)
        )  # fmt: skip
        written = show.write_sweep(found, folder)
    show.emit_text(results.dump(found), as_json, lambda: show.tables_text([tables.sweep_table(found)], written))


def report(
    files: Annotated[list[Path], typer.Argument(help="Results that eval --json, compare or sweep wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
) -> None:
    """Write one HTML page of results that works offline: table, plots, recipes, provenance."""
    from plait.evaluate.results import load
    from plait.report import write_report

    typer.echo(str(write_report([load(path) for path in files], out, title=title)))


def register(app: Any) -> None:
    """Add the verbs to the command line."""
    app.add_typer(suite_app, name="suite")
    app.command("eval")(evaluate)
    for verb in (compare, sweep, report):
        app.command()(verb)
