"""The learners by name: what each does with the workbench, and the numbers and facts it gives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.errors import RecipeError
from plait.learn import objectives, surgery
from plait.learn.bench import Loss, Workbench
from plait.learn.coefficients import Coefficients, combine
from plait.learn.concrete import ConcreteAdaMerging, ConcreteTaskArithmetic, Mask
from plait.learn.guard import Guard, mean_of, reading
from plait.learn.loop import History, Learner, run
from plait.learn.regmean import regmean, regmean_pp
from plait.learn.routers import LayerRouters, learn_identity, routed_net
from plait.learn.statistics import fisher
from plait.learn.vectors import TaskVectors


@dataclass
class Session:
    """Everything a learner works with."""

    bench: Workbench
    options: Any
    seed: int
    work: Path
    custom: objectives.Custom | None = None
    experts: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    """Task → row → the expert's scores, where something asks for them."""

    @functools.cached_property
    def vectors(self) -> TaskVectors:
        """The task vectors, written to a scratch file when they are first asked for."""
        plan = self.bench.plan
        assert plan.method.learned is not None
        return TaskVectors(plan, self.bench.engine, self.work / "vectors.bin", plan.method.learned.vectors)

    def ask_experts(self, everything: bool | None = None) -> None:
        """Have every task's expert answer: the watched inputs, or all (as the objective needs, when not said)."""
        inputs = self.bench.inputs
        if inputs.pairs:
            return
        if everything is None:
            everything = getattr(self.options, "objective", "") == "agreement"
        rows = {
            task: [*inputs.watch[task].tolist(), *(inputs.learn[task].tolist() if everything else [])]
            for task in inputs.tasks
        }
        found = self.bench.expert_answers(rows)
        self.experts = {task: dict(zip(rows[task], found[task], strict=True)) for task in rows}
        self.bench.load_base()

    def loss(self) -> Loss:
        """The objective that the options name, or the caller's own."""
        options, custom = self.options, self.custom
        if custom is not None:
            return lambda task, out, rows: custom(task, out)
        if options.objective == "agreement":
            return lambda task, out, rows: objectives.agreement(
                out, torch.stack([self.experts[task][row] for row in rows]), options.temperature
            )
        kind = objectives.contrastive if options.objective == "contrastive" else objectives.entropy
        return lambda task, out, rows: kind(out, options.temperature)

    def guard(self) -> Guard | None:
        """A guard over the watched inputs; none where no answers can be compared, or too few inputs to spare any."""
        watch = self.bench.inputs.watch
        if not self.experts or not all(len(rows) for rows in watch.values()):
            return None
        rows = {task: torch.stack([self.experts[task][row] for row in watch[task].tolist()]) for task in watch}
        return Guard(rows, stops=self.options.guard)

    def run(self, learner: Learner, guard: Guard | None, steps: int, name: str) -> History:
        """The loop, with the session's place and progress."""
        return run(learner, self.bench, guard, steps, self.work, self.bench.engine.progress, name)


@dataclass
class Outcome:
    """What a learner found."""

    numbers: dict[str, Tensor]
    summary: dict[str, Any]
    history: dict[str, Any]


def coefficients(session: Session) -> Outcome:
    """AdaMerging and its kin."""
    session.ask_experts()
    learner = Coefficients(session.bench, session.vectors, session.options, session.loss())
    guard = session.guard()
    history = session.run(learner, guard, session.options.steps, "coefficients")
    return Outcome(learner.numbers(), ended(session, learner, guard, history), vars(history))


def mask(session: Session) -> Outcome:
    """Concrete task arithmetic."""
    session.ask_experts()
    learner = ConcreteTaskArithmetic(session.bench, session.vectors, session.options, session.loss(), session.seed)
    guard = session.guard()
    history = session.run(learner, guard, session.options.steps, "mask")
    summary = ended(session, learner, guard, history)
    return Outcome(learner.mask.numbers(), {**summary, **_masked_alone(session, learner.mask)}, vars(history))


def bilevel(session: Session) -> Outcome:
    """Concrete AdaMerging: the mask in turn with the coefficients, then the coefficients on the finished mask."""
    session.ask_experts()
    options, loss = session.options, session.loss()
    first = ConcreteAdaMerging(session.bench, session.vectors, options, loss, session.seed)
    guard = session.guard()
    history = session.run(first, guard, options.steps, "mask")
    first.mask.settle()
    second = Coefficients(
        session.bench, session.vectors, options, loss, lr=options.finetune_lr, share=first.mask.share,
        offset=2 * options.steps,
    )  # fmt: skip
    again = None if guard is None else Guard(guard.experts, guard.stops)
    after = session.run(second, again, options.finetune_steps, "coefficients")
    summary = ended(session, second, again, after)
    summary["mask"] = {
        **first.mask.facts(), **({"verdict": guard.verdict, "best_step": guard.best_step} if guard else {})
    }  # fmt: skip
    joined = {
        "loss": history.loss + after.loss,
        "checks": history.checks + after.checks,
        "mask_steps": len(history.loss),
    }
    for check in after.checks:
        check["step"] += len(history.loss)
    numbers = {**first.mask.numbers(), **second.numbers()}
    return Outcome(numbers, {**summary, **_masked_alone(session, first.mask)}, joined)


def ended(session: Session, learner: Learner, guard: Guard | None, history: History) -> dict[str, Any]:
    """Facts of a fit that has ended, measured again at the state that was kept."""
    facts: dict[str, Any] = {"steps_taken": len(history.loss), **learner.facts()}
    if guard is None:
        return facts
    learner.show()
    watch = {task: rows.tolist() for task, rows in session.bench.inputs.watch.items()}
    readings = guard.read(session.bench.answers(watch))
    kept = guard.best_step if guard.stops else len(history.loss)
    return {**facts, "kept_step": kept, "agreement": mean_of(readings, "agreement"), **guard.summary(readings)}


def _masked_alone(session: Session, mask: Mask) -> dict[str, Any]:
    """The sanity check of a mask: each expert under it, alone and at weight 1, must answer as before."""
    if not session.experts:
        return {}
    bench, vectors = session.bench, session.vectors
    mask.settle()
    found = {}
    for place, task in enumerate(vectors.tasks):
        alone = torch.zeros(len(vectors.tasks))
        alone[place] = 1
        for name in mask.names:
            bench.install(name, combine(bench, vectors, name, alone, mask.share(name)))
        rows = list(session.experts[task])
        scores = bench.answers({task: rows})[task]
        found[task] = reading(scores, torch.stack([session.experts[task][row] for row in rows])).agreement
    return {"masked_alone_agrees": found}


def measured(found: Callable[..., tuple[dict[str, Tensor], dict[str, Any]]]) -> Callable[[Session], Outcome]:
    """Learning in closed form: task vectors of the merged model."""

    def learner(session: Session) -> Outcome:
        deltas, summary = found(session.bench, session.vectors, session.options)
        return Outcome({f"delta/{name}": value.cpu() for name, value in deltas.items()}, summary, {})

    return learner


def corrections(session: Session) -> Outcome:
    """Representation surgery; judged, as all else, by agreement with the experts on watched inputs."""
    session.ask_experts()
    bench, guard = session.bench, session.guard()
    found = surgery.operate(bench, session.vectors, session.options)
    summary: dict[str, Any] = {"distance": surgery.facts(found), "labels": surgery.head_labels(bench)}
    if guard is not None:
        readings = guard.read({task: bench.net.heads[task](item.features) for task, item in found.items()})
        summary |= {"agreement": mean_of(readings, "agreement"), **guard.summary(readings)}
    return Outcome(surgery.head_numbers(bench, found), summary, {})


def layer_routers(session: Session) -> Outcome:
    """WEMoE's routers."""
    session.ask_experts()
    loss, guard = session.loss(), session.guard()
    routed_net(session.bench, session.bench.plan, session.work)
    learner = LayerRouters(session.bench, session.options, loss)
    history = session.run(learner, guard, session.options.steps, "routers")
    return Outcome(learner.numbers(), ended(session, learner, guard, history), vars(history))


def task_router(session: Session) -> Outcome:
    """Twin-Merging's router."""
    bench = session.bench
    routed_net(bench, bench.plan, session.work)
    return Outcome(*learn_identity(bench, session.options, session.seed, bench.engine.progress.note))


LEARNERS: dict[str, Callable[[Session], Outcome]] = {
    "coefficients": coefficients,
    "mask": mask,
    "bilevel": bilevel,
    "fisher": measured(fisher),
    "regmean": measured(regmean),
    "regmean_pp": measured(regmean_pp),
    "surgery": corrections,
    "layer_routers": layer_routers,
    "task_router": task_router,
}


def learner_of(name: str) -> Callable[[Session], Outcome]:
    """A learner by name."""
    if name not in LEARNERS:
        raise RecipeError(f"no learner is called '{name}'")
    return LEARNERS[name]
