import pytest
import torch

from pipeline.spiking.subspace import RowBudget, Subspace
from pipeline.spiking.synapse import Linear


def test_what_is_written_last_holds_for_all_later_tasks():
    rows = RowBudget("HLOP", [[3, 2], (1, 0)])
    assert [rows.of(task) for task in range(4)] == [(3, 2), (1, 0), (1, 0), (1, 0)]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (1, None),
        (3, None),
        (4, "who: rows of all 4 tasks must fit into the 5 inputs of first; got 6"),
    ],
)
def test_there_must_be_room(tasks, message):
    rows, synapses = (
        RowBudget("HLOP", ((3, 2), (1, 0))),
        {"first": Linear(5, 4), "second": Linear(4, 2)},
    )
    if message is None:
        rows.check("who", synapses, tasks=tasks)
        return
    with pytest.raises(ValueError) as refused:
        rows.check("who", synapses, tasks=tasks)
    assert str(refused.value) == message


def test_each_synapse_has_its_number():
    with pytest.raises(
        ValueError, match=r"who: rows must name one for each of first; got \(3, 2\)"
    ):
        RowBudget("HLOP", ((3, 2),)).check("who", {"first": Linear(5, 4)}, tasks=1)


def test_rows_grow_task_by_task_from_keys_of_their_own():
    rows = RowBudget("HLOP", ((2, 2), (1, 1)))
    subspaces = [Subspace(3, dtype=torch.float64, device=torch.device("cpu")) for _ in range(2)]
    rows.grow("who", subspaces, task=0, key_of=lambda index: index)
    assert not torch.equal(subspaces[0].new, subspaces[1].new)
    rows.grow("who", subspaces, task=1, key_of=lambda index: index)
    assert [(len(each.old), len(each.new), each.free) for each in subspaces] == [(2, 1, 0)] * 2
    with pytest.raises(
        ValueError,
        match=r"who: rows must fit .* got 1 more for task 2, where synapse 0 has 0 directions left",
    ):
        rows.grow("who", subspaces, task=2, key_of=lambda index: index)
