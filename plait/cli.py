"""The command line: one function per verb, no logic. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from plait import cli_measure, cli_upkeep, stopping
from plait.errors import CheckpointError, PlaitError, RecipeError

app = typer.Typer(
    name="plait",
    help="Merge several fine-tuned experts of one base model into one multi-task model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Memory = Annotated[str, typer.Option(help="Bound of the merge's buffers, beyond the inputs that are read by span.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Default: the processors this process may use.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
Base = Annotated[str | None, typer.Option("--base", help="Base model, where there is no recipe file.")]
Experts = Annotated[list[str] | None, typer.Option("--expert", "-e", help="An expert: folder, hub id, or name=folder.")]
Method = Annotated[str | None, typer.Option("--method", "-m", help="Merge without a recipe file, by this method.")]
Data = Annotated[
    str | None, typer.Option("--data", help="Suite to learn from (its adapt splits), where there is no recipe file.")
]
Settings = Annotated[list[str] | None, typer.Option("--set", "-s", help="A parameter, such as density=0.2.")]


@app.callback()
def options(
    offline: Annotated[
        bool, typer.Option("--offline", help="Never use the network: hub ids must be in the cache already.")
    ] = False,
) -> None:
    """Merge several fine-tuned experts of one base model into one multi-task model."""
    if offline:  # read by huggingface_hub, datasets and transformers when a verb imports them
        os.environ["HF_HUB_OFFLINE"] = "1"


@app.command()
def init(method: Annotated[str, typer.Argument(help="Method the recipe is for.")] = "task_arithmetic") -> None:
    """Print a commented recipe to start from."""
    import plait.methods  # noqa: F401
    from plait.templates import recipe_template

    typer.echo(recipe_template(method), nl=False)


@app.command()
def check(recipe: Annotated[Path, typer.Argument(help="Recipe file.")], as_json: Json = False) -> None:
    """Check a recipe and the headers of its models, and say whether it can be merged."""
    from plait import show_check
    from plait.plan import make_plan
    from plait.recipe import load_recipe
    from plait.show_merge import emit

    plan = make_plan(load_recipe(recipe))
    emit(show_check.check_data(plan), as_json, lambda: show_check.check_text(plan))


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="Recipe file.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor, not groups of like ones.")] = False,
    memory: Memory = "512MB",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Say what would happen to every tensor, and why; bytes, memory and time. Reads headers only."""
    from plait import show
    from plait.plan import make_plan, refusal_text
    from plait.recipe import load_recipe
    from plait.run import usable_threads
    from plait.units import parse_bytes

    made = make_plan(load_recipe(recipe), strict=False)
    budget = show.Budget(parse_bytes(memory, "--memory"), threads or usable_threads())
    show.emit(show.plan_data(made, budget), as_json, lambda: show.plan_text(made, budget, every=tensors))
    if made.refused:
        raise CheckpointError(refusal_text(made.refused))


@app.command()
def merge(
    where: Annotated[
        list[str],
        typer.Argument(metavar="[RECIPE] OUT", help="Recipe file and output folder; only the folder with --method."),
    ],
    method: Method = None,
    base: Base = None,
    expert: Experts = None,
    settings: Settings = None,
    dtype: Annotated[str | None, typer.Option(help="Type of the output, where there is no recipe file.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random methods, where there is no recipe file.")] = None,
    memory: Memory = "512MB",
    threads: Threads = None,
    device: Device = "cpu",
    shard_size: Annotated[str, typer.Option(help="Largest size of one weight file.")] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output folder, at the end, in one step.")
    ] = False,
    state: Annotated[
        Path | None, typer.Option(help="What `plait fit` learned; without it a method that learns is fitted first.")
    ] = None,
    data: Data = None,
    engine: Annotated[str, typer.Option(help="local, or ray: on a cluster (pip install 'plait\\[ray]').")] = "local",
    address: Annotated[str | None, typer.Option(help="Of the Ray cluster; without it, one of this machine.")] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Pass NaN and infinities through in their places, and say where.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Merge: as a recipe file says, or with --method, --base and --expert. Interrupted merges go on where they were."""
    from plait import progress, run, show_merge
    from plait.engine import keep_freed_memory

    keep_freed_memory()
    recipe, out = _recipe_and_out(where, method, base, expert, settings, dtype, seed, data)
    with progress.shown(quiet or as_json) as shown:
        merged = run.merge(
            recipe, out, memory=memory, threads=threads, device=device, shard_size=shard_size, overwrite=overwrite,
            state=state, engine=engine, address=address, allow_nonfinite=allow_nonfinite, progress=shown,
        )  # fmt: skip
    show_merge.emit(show_merge.merged_data(merged), as_json, lambda: show_merge.merged_text(merged))


@app.command()
def fit(
    where: Annotated[
        list[str],
        typer.Argument(metavar="[RECIPE] STATE", help="Recipe file and state folder; only the folder with --method."),
    ],
    method: Method = None,
    base: Base = None,
    expert: Experts = None,
    settings: Settings = None,
    seed: Annotated[int | None, typer.Option(help="Seed, where there is no recipe file.")] = None,
    data: Data = None,
    memory: Memory = "512MB",
    threads: Threads = None,
    device: Device = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a fit that was interrupted.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing state, at the end.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Learn what a method needs from unlabeled inputs, and write it as a small state that `merge --state` applies."""
    from plait import progress, run, show, show_state

    recipe, out = _recipe_and_out(where, method, base, expert, settings, None, seed, data)
    with progress.shown(quiet or as_json) as shown:
        state = run.fit(
            recipe, out, memory=memory, threads=threads, device=device, resume=resume, overwrite=overwrite,
            progress=shown,
        )  # fmt: skip
    show.emit(show_state.state_data(state), as_json, lambda: show_state.state_text(state))


@app.command()
def inspect(
    models: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE | STATE | EXPERT…", help="A recipe file, a state, or experts with --base."),
    ],
    base: Base = None,
    memory: Memory = "512MB",
    threads: Threads = None,
    device: Device = "cpu",
    tensors: Annotated[bool, typer.Option("--tensors", help="Also every tensor by itself.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Compare the experts' task vectors (norms, cosines, agreement of signs), or show what a state has learned."""
    from plait import progress, show, show_state
    from plait.engine import Engine
    from plait.inspect import inspect_plan
    from plait.plan import make_plan
    from plait.recipe import load_recipe
    from plait.run import usable_threads
    from plait.state import FACTS, load_state
    from plait.units import parse_bytes

    if len(models) == 1 and base is None and (Path(models[0]) / FACTS).is_file():
        state = load_state(models[0])
        show.emit(show_state.state_data(state), as_json, lambda: show_state.state_text(state))
        return
    recipe: Any = models[0] if len(models) == 1 and models[0].endswith((".yaml", ".yml", ".json")) else None
    if recipe is not None and base is not None:
        raise RecipeError("inspect: a recipe file names its own base_model; --base goes with experts")
    made = make_plan(load_recipe(recipe or _adhoc("task_arithmetic", base, models, {}, None, 0)))
    with progress.shown(quiet or as_json) as shown:
        engine = Engine(
            threads=threads or usable_threads(), memory=parse_bytes(memory, "--memory"), device=device, progress=shown
        )
        data = inspect_plan(made, engine)
    show.emit(data, as_json, lambda: show.inspect_text(data, every=tensors))


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method in full.")] = None, as_json: Json = False
) -> None:
    """List the merge methods, or show one: what it computes, its parameters, its paper."""
    from plait import show
    from plait.methods import all_methods, get_method

    chosen = {name: get_method(name)} if name is not None else all_methods()
    show.emit(show.methods_data(chosen), as_json, lambda: show.methods_text(chosen, full=name is not None))


def _recipe_and_out(
    where: list[str], method: str | None, base: str | None, expert: list[str] | None, settings: list[str] | None,
    dtype: str | None, seed: int | None, data: str | None,
) -> tuple[Any, str]:  # fmt: skip
    if method is None:
        if len(where) != 2 or base or expert or settings or dtype or data or seed is not None:
            raise RecipeError("merge: give RECIPE and OUT, or --method, --base, --expert … and OUT")
        return where[0], where[1]
    if len(where) != 1:
        raise RecipeError("merge: with --method, give only the output folder OUT")
    given: dict[str, Any] = {}
    for setting in settings or []:
        key, mark, value = setting.partition("=")
        if not mark:
            raise RecipeError(f"--set {setting}: must be name=value, such as density=0.2")
        given[key] = _value(value)
    recipe = _adhoc(method, base, expert or [], given, dtype, seed or 0)
    return {**recipe, **({"data": data} if data else {})}, where[0]


def _adhoc(
    method: str, base: str | None, experts: list[str], settings: dict[str, Any], dtype: str | None, seed: int
) -> dict[str, Any]:
    if not experts:
        raise RecipeError("merge: name the models with --expert, once for each")
    models = []
    for spec in experts:
        name, mark, path = spec.partition("=")
        named = mark and "/" not in name and not Path(spec).exists()
        models.append({"model": path, "name": name} if named else {"model": spec})
    import plait.methods  # noqa: F401
    from plait.methods.contract import split_settings

    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": models,
        "seed": seed,
        **split_settings(method, settings),
    }
    return {**recipe, **({"base_model": base} if base else {}), **({"out_dtype": dtype} if dtype else {})}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


cli_measure.register(app)
cli_upkeep.register(app)


def main() -> None:
    """Run the command line. Exit code 2: your recipe or call; 3: your files; 1: the machine, or a bug of ours."""
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")  # it would read every installed package's metadata for them
    gc.set_threshold(10_000)  # imports and plans make many objects and no garbage
    with stopping.listen() as stop:
        try:
            code = _run()
        except BaseException:
            if stop.signal:  # whatever the interruption made of itself on its way
                stop.leave()
            raise
        if stop.signal:
            stop.leave()
    if code:
        sys.exit(code)


def _run() -> int:
    words = sys.argv[1:]
    if "--offline" in words:  # of the program and not of a verb, but people write it anywhere
        words = ["--offline", *(word for word in words if word != "--offline")]
    try:
        code = app(words, standalone_mode=False)
    except PlaitError as error:
        typer.echo(f"plait: {error}", err=True)
        return error.exit_code
    except BrokenPipeError:
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        typer.echo(f"plait: {where}{error.strerror or error}; put that right and run the same command again", err=True)
        return 1
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # click's own usage errors
            error.show()  # type: ignore[attr-defined]
            return error.exit_code  # type: ignore[attr-defined]
        raise
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
