"""How many rows each task adds to the subspace of each synapse (`spiking/subspace.py`), and whether
there is room for them.
"""

from collections.abc import Callable, Mapping, Sequence

from pipeline.core.checks import are_counts
from pipeline.spiking.presynaptic_inputs import fan_in
from pipeline.spiking.subspace import Subspace
from pipeline.spiking.synapse import Conv2d, Linear


class Rows:
    """`counts[task][synapse]`, synapses in order of registration; what is written last holds for
    all later tasks.

    Refusals are in the name of `who`.

    Raises: ValueError for anything but whole numbers >= 0.
    """

    def __init__(self, who: str, counts: Sequence[Sequence[int]]) -> None:
        if (
            not isinstance(counts, Sequence)
            or not counts
            or not all(are_counts(each, least=0) for each in counts)
        ):
            raise ValueError(
                f"{who}: rows must hold, for each task, a number >= 0 for each synapse; got"
                f" rows={counts!r}"
            )
        self.counts = tuple(tuple(each) for each in counts)

    def of(self, task: int) -> tuple[int, ...]:
        return self.counts[min(task, len(self.counts) - 1)]

    def check(self, who: str, synapses: Mapping[str, Linear | Conv2d], *, tasks: int) -> None:
        """Raises: ValueError unless there is a number for each synapse, and room for the rows of so
        many tasks.
        """
        for each in self.counts:
            if len(each) != len(synapses):
                raise ValueError(
                    f"{who}: rows must name one for each of {', '.join(synapses)}; got {each}"
                )
        what = "rows" if tasks == 1 else f"rows of all {tasks} tasks"
        for index, (name, synapse) in enumerate(synapses.items()):
            asked = sum(self.of(task)[index] for task in range(tasks))
            if asked > fan_in(synapse):
                raise ValueError(
                    f"{who}: {what} must fit into the {fan_in(synapse)} inputs of {name}; got"
                    f" {asked}"
                )

    def grow(
        self, who: str, subspaces: Sequence[Subspace], *, task: int, key_of: Callable[[int], int]
    ) -> None:
        """Freeze what the subspaces learnt and begin the rows of `task`, those of synapse i drawn
        from `key_of(i)`.

        Raises: ValueError where a synapse has fewer directions left.
        """
        for index, (subspace, count) in enumerate(zip(subspaces, self.of(task), strict=True)):
            if count > subspace.free:
                raise ValueError(
                    f"{who}: rows must fit into the inputs of a synapse; got {count} more for task"
                    f" {task}, where synapse {index} has {subspace.free} directions left"
                )
            subspace.grow(count, key=key_of(index))
