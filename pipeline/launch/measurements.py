"""The measurements of a suite: sweeps, interleaved times and plans. Each is an entry of the suite.

They begin after all runs are over. They run one after another, in the process of the launch. Each
result is written atomically to a file in the suite's folder. A resume makes the measurements whose
file is missing.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.core.run_folder import RunFolder
from pipeline.core.stages import say_stage
from pipeline.measure.memory import hardware_differences
from pipeline.recipe.json import read_json, write_json
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.suite import Measurement, Suite, measured_in, runs_of
from pipeline.track.events import Start
from pipeline.track.journal import every
from pipeline.track.provenance import conditions_of


def measure_the_rest(folder: Path, suite: Suite, *, trust: tuple[str, ...]) -> None:
    """Make the measurements whose files are missing in a suite's folder.

    A measurement that is refused here also gets a file: `{"refused": why}`.
    """
    files, runs = measured_in(folder), runs_of(folder)
    for measurement in suite.measurements:
        if files[measurement.name].exists():
            continue
        say_stage(f"measuring {measurement.name}")
        try:
            result = _measure(measurement, runs, trust)
        except ValueError as error:
            result = {"refused": str(error)}
        write_json(files[measurement.name], result)


def _measure(measurement: Measurement, runs: Mapping[str, Path], trust: tuple[str, ...]) -> Any:
    """The result of a measurement as JSON values.

    Raises:
        ValueError: the run that it belongs to was trained on another machine, or the function
            refuses.
    """
    recipes = [
        recipe
        if isinstance(recipe, Recipe)
        else Recipe.read(RunFolder(runs[recipe]).recipe, trust=trust)
        for recipe in measurement.of
    ]
    conditions = next(
        (_conditions(runs[recipe]) for recipe in measurement.of if isinstance(recipe, str)), None
    )
    if conditions is not None:
        _refuse_elsewhere(conditions)
    return _FUNCTIONS[measurement.kind](recipes, conditions, **measurement.options)


def _sweep(recipes: list[Recipe], conditions: Mapping[str, Any] | None, **options: Any) -> Any:
    """Costs over the time steps `steps`. By default these are the recipe's time steps alone."""
    from pipeline.forecast.sweep import sweep

    options = {"steps": (recipes[0].time_steps,), **options}
    return sweep(recipes[0], rules=[each.rule for each in recipes], **options).to_json()


def _interleaved(
    recipes: list[Recipe], conditions: Mapping[str, Any] | None, **options: Any
) -> Any:
    """Times by the label of each rule, with the run's number of workers, samples and threads."""
    from pipeline.forecast.interleaved import measure_interleaved

    conditions = conditions or {"hardware": {}}
    settings = {
        "workers": conditions.get("world_size") or 1,
        "samples": conditions.get("micro_batch"),
        "threads": conditions["hardware"].get("threads", 1),
        **options,
    }
    times_of = measure_interleaved(recipes[0], [each.rule for each in recipes], **settings)
    return {label: asdict(times) for label, times in times_of.items()}


def _plan(
    recipes: list[Recipe],
    conditions: Mapping[str, Any] | None,
    *,
    device: str,
    samples: int,
    workers: int,
) -> Any:
    """A plan for `workers` GPUs of the device table."""
    from pipeline.forecast.plan import DEVICES, Cluster, plan

    cluster = Cluster(workers=workers, device=DEVICES[device])
    return asdict(plan(recipes[0], cluster, samples=samples, rules=[each.rule for each in recipes]))


_FUNCTIONS = {"sweep": _sweep, "interleaved": _interleaved, "plan": _plan}


def _conditions(run: Path) -> dict[str, Any]:
    """The conditions at the end of a run: workers, micro-batch, machine, threads."""
    files = RunFolder(run)
    summary = read_json(files.summary) if files.summary.exists() else {}
    return conditions_of(summary, every(files.journal, Start.kind))[-1]


def _refuse_elsewhere(conditions: Mapping[str, Any]) -> None:
    """Raises: ValueError if a run was trained on another machine, or on another of its devices."""
    differences = hardware_differences(
        conditions["hardware"] or {}, own_cores=conditions["own_cores"]
    )
    if other := [f"{name} {there}, here {here}" for name, here, there in differences]:
        raise ValueError(f"the runs were trained on another machine: {'; '.join(other)}")
