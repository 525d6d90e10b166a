"""The measurements of a suite: sweeps, interleaved times and plans, each an entry beside its runs.

They begin once all runs are over, one after another, in the process of the launch. Each result is
written whole to a file of the suite's folder. A resume measures what has no file yet.
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
    """Measure what a suite's folder lacks.

    A measurement that cannot be made here has a file, too: `{"refused": why}`.
    """
    files, runs = measured_in(folder), runs_of(folder)
    for each in suite.measurements:
        if files[each.name].exists():
            continue
        say_stage(f"measuring {each.name}")
        try:
            found = _measured(each, runs, trust)
        except ValueError as error:
            found = {"refused": str(error)}
        write_json(files[each.name], found)


def _measured(each: Measurement, runs: Mapping[str, Path], trust: tuple[str, ...]) -> Any:
    """The result as JSON values.

    Raises:
        ValueError: the run that it belongs to was trained on another machine, or the function
            refuses.
    """
    recipes = [
        of if isinstance(of, Recipe) else Recipe.read(RunFolder(runs[of]).recipe, trust=trust)
        for of in each.of
    ]
    on = next((_conditions(runs[of]) for of in each.of if isinstance(of, str)), None)
    if on is not None:
        _refuse_elsewhere(on)
    return _FUNCTIONS[each.kind](recipes, on, **each.options)


def _sweep(recipes: list[Recipe], on: Mapping[str, Any] | None, **options: Any) -> Any:
    """Without `steps`, at the time steps of the recipe."""
    from pipeline.forecast.sweep import sweep

    options = {"steps": (recipes[0].time_steps,), **options}
    return sweep(recipes[0], rules=[each.rule for each in recipes], **options).to_json()


def _interleaved(recipes: list[Recipe], on: Mapping[str, Any] | None, **options: Any) -> Any:
    """By the label of each rule, with as many workers, samples and threads as the run had."""
    from pipeline.forecast.interleaved import measure_interleaved

    on = on or {"hardware": {}}
    about = {
        "workers": on.get("world_size") or 1,
        "samples": on.get("micro_batch"),
        "threads": on["hardware"].get("threads", 1),
        **options,
    }
    found = measure_interleaved(recipes[0], [each.rule for each in recipes], **about)
    return {label: asdict(times) for label, times in found.items()}


def _plan(
    recipes: list[Recipe], on: Mapping[str, Any] | None, *, device: str, samples: int, workers: int
) -> Any:
    """For `workers` cards of the table of devices."""
    from pipeline.forecast.devices import DEVICES
    from pipeline.forecast.plan import Cluster, plan

    cluster = Cluster(workers=workers, device=DEVICES[device])
    return asdict(plan(recipes[0], cluster, samples=samples, rules=[each.rule for each in recipes]))


_FUNCTIONS = {"sweep": _sweep, "interleaved": _interleaved, "plan": _plan}


def _conditions(run: Path) -> dict[str, Any]:
    """What a run was trained on at its end: workers, micro-batch, machine, threads."""
    files = RunFolder(run)
    summary = read_json(files.summary) if files.summary.exists() else {}
    return conditions_of(summary, every(files.journal, Start.kind))[-1]


def _refuse_elsewhere(on: Mapping[str, Any]) -> None:
    """Raises: ValueError if a run was trained on another machine, or on another of its devices."""
    found = hardware_differences(on["hardware"] or {}, own_cores=on["own_cores"])
    if other := [f"{name} {there}, here {here}" for name, here, there in found]:
        raise ValueError(f"the runs were trained on another machine: {'; '.join(other)}")
