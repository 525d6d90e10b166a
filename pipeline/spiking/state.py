"""The memory of a network between time steps.

A stateful module holds a `State` as its attribute `state`. `fresh_state(model)` is the only owner:
it opens all states of a model at the start of a batch and clears them at the end. The values are
plain tensors. Buffers would enter `state_dict`, and DDP would overwrite them with those of rank 0
at each forward (measured on torch 2.13).
"""

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipeline.core.checks import require

# Attributes that a rule sets on modules. A seam with memory (a trace) holds a `State` as `state`.
SEAMS = ("presynaptic", "backward_weight", "carry", "gradient", "adjoint")


class State:
    """The memory of one neuron or synapse: named tensors, accessible only inside `fresh_state`.

    Raises: ValueError on access outside `fresh_state`.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.is_open = False
        self.values: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor | None:
        """The tensor written at the last step, or None at the first step of a batch."""
        self._check_open()
        return self.values.get(name)

    def write(self, name: str, value: Tensor) -> None:
        self._check_open()
        self.values[name] = value

    def _check_open(self) -> None:
        require(
            self.is_open,
            f"{self.owner}: its membrane or trace exists only inside fresh_state; write"
            " `with fresh_state(model): logits_TBK = model(x_TB)`",
        )


@contextmanager
def fresh_state(model: nn.Module) -> Iterator[None]:
    """Give the model empty memory for one batch inside the block.

    T slices of length 1 continue one another and equal one call on T steps. On exit, also by an
    exception, all memory is cleared. A membrane with a graph would keep that graph alive and break
    `deepcopy`.

    Raises: ValueError if the model is already inside a fresh_state.
    """
    states = states_of(model)
    for state in states:
        require(
            not state.is_open,
            "fresh_state: leave the first fresh_state before entering another; got a"
            f" {state.owner} already open",
        )
    try:
        with attribute_set(states, "is_open", True):
            yield
    finally:
        for state in states:
            state.values.clear()


@contextmanager
def attribute_set(holders: Iterable[Any], name: str, value: object) -> Iterator[None]:
    """Set the attribute `name` of each of `holders` to `value` inside the block.

    The old value is restored afterwards.
    """
    before = [(holder, getattr(holder, name)) for holder in holders]
    for holder, _ in before:
        setattr(holder, name, value)
    try:
        yield
    finally:
        for holder, old in before:
            setattr(holder, name, old)


@contextmanager
def hooked(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keep `hooks` registered inside the block, and remove them afterwards."""
    registered = list(hooks)
    try:
        yield
    finally:
        for hook in registered:
            hook.remove()


def states_of(model: nn.Module) -> list[State]:
    """Every state in `model` and its seams, each once.

    `model` may be a wrapper around a network.
    """
    states: dict[int, State] = {}
    for module in model.modules():
        for holder in (module, *(getattr(module, seam, None) for seam in SEAMS)):
            state = getattr(holder, "state", None)
            if isinstance(state, State):
                states[id(state)] = state
    return list(states.values())


def state_bytes(model: nn.Module, *, beside: Container[int] = ()) -> int:
    """Bytes of all state tensors (membranes, traces, cached values and gradients).

    Each storage counts once. Outside `fresh_state` the result is 0.

    Storages whose `_cdata` is in `beside` are skipped, such as traces that the backward keeps
    anyway.
    """
    values = (value for state in states_of(model) for value in state.values.values())
    storages = {value.untyped_storage()._cdata: value.untyped_storage() for value in values}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in beside)
