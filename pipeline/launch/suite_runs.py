"""The runs of a suite: which of them are left, which can begin, and the job of each run. A run can
begin once the runs that it depends on are over.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.core.checks import require
from pipeline.core.run_folder import RunFolder
from pipeline.launch.cluster import Cluster
from pipeline.launch.driver import check
from pipeline.launch.prepare import prepare, read_job
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.suite import SuiteFile, filled, needed, runs_of, sources
from pipeline.track.state import best, is_over, top1_of
from pipeline.train.job import Job
from pipeline.train.weights import lasting_weights


@dataclass(frozen=True)
class SuiteRuns:
    """The runs of one launch or resume of a suite."""

    folder: Path  # Of the suite
    suite_file: SuiteFile
    cluster: Cluster
    trust: tuple[str, ...] = ()

    @cached_property
    def where(self) -> dict[str, Path]:
        """The folder of each recipe's run, by the recipe's name. It may not exist yet."""
        return runs_of(self.folder)

    @property
    def resume_address(self) -> str | None:
        """The `--address` of the command that resumes the suite or one of its runs."""
        return self.cluster.resume_address(Cluster.from_json(self.suite_file.cluster))

    def is_over(self, name: str) -> bool:
        """Whether the run of the recipe of this name needs no more training."""
        return is_over(self.where[name], is_needed=name in self._sources)

    @cached_property
    def _sources(self) -> set[str]:
        return sources(self.suite_file.suite)

    def left(self) -> list[Recipe]:
        """The recipes whose runs are not over, in the suite's order."""
        return [recipe for recipe in self.suite_file.suite.recipes if not self.is_over(recipe.name)]

    def can_begin(self, recipe: Recipe) -> bool:
        """Whether the runs are over from which this run takes weights or a choice."""
        return all(self.is_over(name) for name in needed(self.suite_file.suite, recipe))

    def job(self, recipe: Recipe) -> Job:
        """The job of a run. A run that has not begun is prepared, with its recipe completed.

        Raises:
            ValueError: its folder is damaged or not of this suite, or the completed recipe is
                refused.
        """
        run, parent = self.where[recipe.name], self.suite_file.parent
        if run.exists():
            return begun_job(run, parent, trust=self.trust)
        ready = filled(self._chosen(recipe), lambda name: lasting_weights(self.where[name]))
        check(ready, self.cluster, trust=self.trust)
        return prepare(
            ready,
            self.cluster,
            self.folder.parent,
            name=run.name,
            parent=parent,
            suite=self.folder.name,
            family=self.suite_file.suite.family,
            trust=self.trust,
        )

    def _chosen(self, recipe: Recipe) -> Recipe:
        """The recipe with the best value of its trials, if it has trials."""
        choice = self.suite_file.suite.choices.get(recipe.name)
        if choice is None:
            return recipe
        best_trial = best({name: top1_of(self.where[name]) for name in choice.trials})
        [trial] = [each for each in self.suite_file.suite.recipes if each.name == best_trial]
        return recipe.override({choice.field: trial.value_of(choice.field)})


def begun_job(run: Path, parent: str, *, trust: tuple[str, ...]) -> Job:
    """The job of a run that has its folder.

    Raises:
        ValueError: the folder is damaged, or the run is not of this suite.
    """
    if not (file := RunFolder(run).job).is_file():
        raise ValueError(
            f"suite: {run.name} must be a whole run; it has no {file.name}: move it away, resume"
        )
    job = read_job(run, trust=trust)
    require(
        job.parent == parent,
        f"suite: {run.name} must be a run of this suite; got one of another launch",
    )
    return job
