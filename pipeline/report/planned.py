"""A plan held against a run that was launched: how far off the model was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.forecast.plan import Cluster, Plan
from pipeline.measure.memory import hardware_differences
from pipeline.recipe.json import differing, listed
from pipeline.recipe.recipe import Recipe, Role, select
from pipeline.report.results import Run, TrainedOn, read_run
from pipeline.report.runs import ReportError
from pipeline.report.selection import trained_apart


@dataclass(frozen=True)
class Quantity:
    """A planned and a measured value."""

    planned: float
    measured: float

    @property
    def error(self) -> float:
        """Relative error: positive if the plan was too high."""
        return self.planned / self.measured - 1


@dataclass(frozen=True, kw_only=True)
class Errors:
    """The errors of one rule's plan."""

    run: str
    rule: str
    own_cores: bool
    """others may have trained beside it, which are in no plan"""
    saved_bytes: Quantity
    step_s: Quantity
    """of the batches whose speed counts: neither the first nor those on which bytes or operations
    are counted
    """

    def describe(self) -> str:
        saved, step = self.saved_bytes, self.step_s
        return (
            f"Against {self.run}, {self.rule}: saved for backward {saved.planned / 1e6:.4g} MB"
            f" planned, {saved.measured / 1e6:.4g} MB measured, {saved.error:+.1%}; a step"
            f" {step.planned * 1e3:.4g} ms planned, {step.measured * 1e3:.4g} ms measured,"
            f" {step.error:+.1%}."
            + (
                " It had cores of its own; runs on the others, and the memory that they share, are"
                " in no plan." * self.own_cores
            )
        )

    def to_json(self) -> dict[str, Any]:
        quantities = {"saved_bytes": self.saved_bytes, "step_s": self.step_s}
        errors = {name: {**asdict(each), "error": each.error} for name, each in quantities.items()}
        return {**asdict(self), **errors}


def refuse_unless_comparable(recipe: Recipe, cluster: Cluster, folder: Path) -> None:
    """Refuse a run that a plan of `recipe` on `cluster` does not describe.

    Raises:
        ReportError: it has not finished, was of another recipe, on other machines or other workers,
        or changed them on the way.
    """
    run, on = _measured(folder)
    found = [("workers", cluster.workers, on.world_size)]
    found = [each for each in found if each[1] != each[2]] + _other_machine(cluster, on)
    mine = recipe.resolved().to_json()["recipe"]
    found += list(
        differing(
            "",
            *(
                select(each, lambda role: Role.STUDY in role and Role.NO_STEP_COST not in role)
                for each in (mine, run.recipe)
            ),
        )
    )
    _refuse_if(found, folder)


def _other_machine(cluster: Cluster, on: TrainedOn) -> list[tuple[str, Any, Any]]:
    """Differences of the planned machine from the run's. A card's host is not part of a plan."""
    there = on.hardware
    if cluster.device is not None:
        return list(differing("card", cluster.device.driver, there["gpu"]))
    found = [
        (f"hardware.{name}", *values)
        for name, *values in hardware_differences(there, own_cores=on.own_cores)
    ]
    if there["threads"] != cluster.threads:
        found.append(("cpus-per-worker", cluster.threads, there["threads"]))
    return found


def errors(found: Plan, folder: Path) -> Errors:
    """The errors of the plan of the rule that trained the run.

    Raises:
        ReportError: the plan has no such rule, another one of its label, or a micro-batch that the
        run was not trained in.
    """
    run, on = _measured(folder)
    planned = next((each for each in found.rules if each.rule == run.rule), None)
    if planned is None:
        rules = ", ".join(each.rule for each in found.rules) or "none"
        raise ReportError(
            f"plan: --against must be of a rule that is planned, {rules}; got {run.rule} of"
            f" {folder.name}"
        )
    of_rule = differing("rule", {**planned.written}, run.recipe["rule"])
    _refuse_if([*of_rule, *differing("micro_batch", planned.micro_batch, on.micro_batch)], folder)
    summary = run.summary or {}
    batch_size = planned.images_per_s * planned.step_s
    return Errors(
        run=folder.name,
        rule=planned.rule,
        saved_bytes=Quantity(planned.saved_bytes, summary["peak_saved_bytes"]),
        step_s=Quantity(planned.step_s, batch_size / summary["images_per_s"]),
        own_cores=on.own_cores,
    )


def _measured(folder: Path) -> tuple[Run, TrainedOn]:
    """The run and the conditions that it was trained under from first to last step."""
    run = read_run(folder)
    if not run.value("images_per_s") or not run.value("peak_saved_bytes"):
        raise ReportError(
            "plan: --against must be a run that has finished, of more than a few batches, on one"
            f" of which its saved bytes were counted; got {folder.name}"
        )
    first, *later = run.trained_on
    if later:
        changed = listed(list(trained_apart([asdict(first)], [asdict(each) for each in later])))
        raise ReportError(
            f"plan: --against must be a run that changed nothing on the way; {folder.name} did:"
            f" {changed}"
        )
    return run, first


def _refuse_if(differs: Sequence[tuple[str, Any, Any]], folder: Path) -> None:
    if differs:
        shown = "; ".join(f"{name}: {a} and {b}" for name, a, b in differs[:4])
        raise ReportError(
            f"plan: --against must be a run of what is planned; {folder.name} differs: {shown}"
        )
