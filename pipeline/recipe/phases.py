"""Tasks that are learnt one after another, and the steps of a run that belong to each.

    phases=(Phase(name="task-0", data=spec(Permuted, task=0)),
            Phase(name="task-1", data=spec(Permuted, task=1)))

A `Stretch` has the steps of one phase, or of a whole run without phases. Steps (global batches) and
epochs are counted over the whole run. So the step alone determines phase, epoch and sample, also
after a resume.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.core.checks import is_count, require
from pipeline.recipe.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One task of a recipe.

    Each task has a new optimizer state and schedule; weights and the rule's state are kept.

    Fields:
        data: its target receives the recipe's data and returns a `pipeline.data.base.Data`;
            `pipeline.data.datasets.tasks` has such targets
        epochs: of this task; None: the recipe's
        head: index of the head of a multi-head classifier; None: the network has one head

    Raises: ValueError that names the phase and the field.
    """

    name: str
    data: Spec
    epochs: int | None = None
    head: int | None = None

    def __post_init__(self) -> None:
        require(
            isinstance(self.name, str) and self.name.strip(),
            f"phase: name must be text; got {self.name!r}",
        )
        require(
            isinstance(self.data, Spec),
            f"phase {self.name}: data must be spec(...), as in pipeline.data.datasets.tasks;"
            f" got {self.data!r}",
        )
        first = next(iter(inspect.signature(self.data.target).parameters), "")
        require(
            first not in self.data.kwargs,
            f"phase {self.name}: data must not set {first!r}, which receives the recipe's data",
        )
        for name, value, minimum in (("epochs", self.epochs, 1), ("head", self.head, 0)):
            require(
                value is None or is_count(value, minimum=minimum),
                f"phase {self.name}: {name} must be None or a whole number from {minimum}; got"
                f" {value!r}",
            )


def check_phases(phases: Sequence[Phase]) -> None:
    """Refuse phases that do not fit together.

    Raises:
        ValueError: a value is no Phase, two phases have the same name, or only some phases name a
            head.
    """
    require(
        all(isinstance(phase, Phase) for phase in phases),
        f"recipe: phases must be written as Phase(...); got {phases!r}",
    )
    names = [phase.name for phase in phases]
    require(
        len(set(names)) == len(names),
        f"recipe: phases must have different names; got {', '.join(names)}",
    )
    without_head = [phase.name for phase in phases if phase.head is None]
    require(
        len(without_head) in (0, len(phases)),
        "recipe: either every phase names its head or none does; got none for"
        f" {', '.join(without_head)}",
    )


@dataclass(frozen=True)
class Stretch:
    """The steps and epochs of one phase, or of a run without phases."""

    index: int
    first: int  # its first step
    steps: int
    first_epoch: int
    epoch_steps: int  # steps of one epoch

    @property
    def end(self) -> int:
        """The step after the last step."""
        return self.first + self.steps

    def epoch(self, step: int) -> int:
        return self.first_epoch + (step - self.first) // self.epoch_steps

    def epoch_start(self, epoch: int) -> int:
        return self.first + (epoch - self.first_epoch) * self.epoch_steps

    def epoch_end(self, epoch: int) -> int:
        """The step after the last step of an epoch."""
        return min(self.epoch_start(epoch + 1), self.end)


def timetable(
    lengths: Sequence[tuple[int, int]], *, stop_after: int | None = None
) -> tuple[Stretch, ...]:
    """One stretch for each (epochs, steps per epoch). Each has at most `stop_after` steps."""
    stretches: list[Stretch] = []
    first = first_epoch = 0
    for index, (epochs, epoch_steps) in enumerate(lengths):
        steps = min(epochs * epoch_steps, stop_after or epochs * epoch_steps)
        stretches.append(Stretch(index, first, steps, first_epoch, epoch_steps))
        first += steps
        first_epoch += math.ceil(steps / epoch_steps)
    return tuple(stretches)


def stretch_at(stretches: Sequence[Stretch], step: int) -> Stretch:
    """The stretch that contains `step`. After the last step it is the last stretch."""
    return next((each for each in stretches if step < each.end), stretches[-1])
