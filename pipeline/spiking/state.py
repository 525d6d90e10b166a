"""The memory of a network between time steps.

A module with memory has a `State` as its attribute `state`. Only `fresh_state(model)` opens and
clears states: it opens all states of a model at the start of a batch, and clears them at the end.
The values are plain tensors, not buffers. Buffers would be in `state_dict`, and DDP would overwrite
them with the buffers of rank 0 at each forward (measured on torch 2.13).
"""

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from pipeline.core.checks import require

# A seam is an attribute of a module that a rule sets to change the module's forward or backward.
# The value of each of these seams, such as a trace, can have a `State` as its attribute `state`.
SEAMS = ("presynaptic", "backward_weight", "carry", "custom_forward", "adjoint")


class State:
    """The memory of one module or trace: named tensors, accessible only inside `fresh_state`.

    `owner` is the name of the module in error messages.

    Raises: ValueError on access outside `fresh_state`.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.is_open = False
        self.values: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor | None:
        """The last tensor written under `name` in this batch, or None."""
        self._check_open()
        return self.values.get(name)

    def write(self, name: str, value: Tensor) -> None:
        self._check_open()
        self.values[name] = value

    def _check_open(self) -> None:
        require(
            self.is_open,
            f"{self.owner}: the state exists only inside fresh_state; write"
            " `with fresh_state(model): logits_TBK = model(x_TB)`",
        )


@contextmanager
def fresh_state(model: nn.Module) -> Iterator[None]:
    """Give the model empty memory for one batch inside the block.

    Each call inside the block continues from the memory of the previous call: T calls on one step
    equal one call on T steps. On exit, also by an exception, all memory is cleared. Otherwise a
    membrane would keep its graph alive, and `deepcopy` of the model would fail.

    Raises: ValueError if the model is already inside a fresh_state.
    """
    states = states_of(model)
    for state in states:
        require(
            not state.is_open,
            "fresh_state: the model must not be inside another fresh_state; got an open state of"
            f" {state.owner}",
        )
    try:
        with set_temporarily(states, "is_open", True):
            yield
    finally:
        for state in states:
            state.values.clear()


@contextmanager
def set_temporarily(owners: Iterable[Any], name: str, value: object) -> Iterator[None]:
    """Set the attribute `name` of each of `owners` to `value` inside the block.

    Afterwards the old values are restored.
    """
    old_values = [(owner, getattr(owner, name)) for owner in owners]
    for owner, _ in old_values:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, old_value in old_values:
            setattr(owner, name, old_value)


@contextmanager
def temporary_hooks(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove `hooks` at the end of the block. If `hooks` is a generator, it runs at the start."""
    handles = list(hooks)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def states_of(model: nn.Module) -> list[State]:
    """Every state in `model` and in its seams, once each.

    `model` may be a wrapper around a network.
    """
    states: dict[int, State] = {}
    for module in model.modules():
        for owner in (module, *(getattr(module, seam, None) for seam in SEAMS)):
            state = getattr(owner, "state", None)
            if isinstance(state, State):
                states[id(state)] = state
    return list(states.values())


def copies_without_graph(model: nn.Module) -> dict[int, Any]:
    """For `deepcopy`, by id: copies of the tensors with a graph that modules keep, such as recorded
    spikes. Without these copies it would refuse the model.
    """
    kept = tree_leaves([list(vars(module).values()) for module in model.modules()])
    return {
        id(x): x.detach().clone() for x in kept if isinstance(x, Tensor) and x.grad_fn is not None
    }


def state_bytes(model: nn.Module, *, excluded: Container[int] = ()) -> int:
    """Bytes of all state tensors (membranes, traces, cached values and gradients).

    Each storage counts once. Outside `fresh_state` the result is 0. Storages with a `_cdata` in
    `excluded` do not count, such as traces that the backward keeps too.
    """
    storages = {
        value.untyped_storage()._cdata: value.untyped_storage()
        for state in states_of(model)
        for value in state.values.values()
    }
    return sum(storage.nbytes() for key, storage in storages.items() if key not in excluded)
