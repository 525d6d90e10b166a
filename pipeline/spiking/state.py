"""What a network remembers between time steps, and who clears it.

A module with memory holds a `State` as its attribute `state`; `fresh_state(model)` is the only
owner: it opens every state of a model at the start of a batch and empties it at the end. The values
are plain tensors, not buffers: a buffer would enter `state_dict`, and DDP would overwrite it by
rank 0's at each forward (measured on torch 2.13).
"""

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# Where a rule puts its callables. A callable with memory of its own (a trace) holds a `State` as
# `state`, too.
SEAMS = ("presynaptic", "backward_weight", "carry", "gradient", "adjoint")


class State:
    """The memory of one neuron or synapse: named tensors, readable only inside `fresh_state`.

    Raises: ValueError when read or written outside `fresh_state`.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.is_open = False
        self.values: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor | None:
        """The tensor of the last step, or None at the first step of a batch."""
        self._check_open()
        return self.values.get(name)

    def write(self, name: str, value: Tensor) -> None:
        self._check_open()
        self.values[name] = value

    def _check_open(self) -> None:
        if not self.is_open:
            raise ValueError(
                f"{self.owner}: its membrane or trace exists only inside fresh_state; "
                "write `with fresh_state(model): logits_TBK = model(x_TB)`"
            )


@contextmanager
def fresh_state(model: nn.Module) -> Iterator[None]:
    """Every neuron of `model` at rest, for the length of one batch.

    Inside, T slices of length 1 continue one another and equal one call on T. On exit, by an
    exception too, everything remembered is dropped: a membrane with a graph would keep that graph
    alive and break `deepcopy`.

    Raises: ValueError when the model is already inside a fresh_state.
    """
    states = states_of(model)
    for state in states:
        if state.is_open:
            raise ValueError(
                "fresh_state: leave the first fresh_state before entering another; got a"
                f" {state.owner} already open"
            )
    for state in states:
        state.is_open = True
    try:
        yield
    finally:
        for state in states:
            state.is_open = False
            state.values.clear()


@contextmanager
def attribute_set(holders: Iterable[Any], name: str, value: object) -> Iterator[None]:
    """Inside, the attribute `name` of each of `holders` is `value`; afterwards it is what it
    was.
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
    """Inside, `hooks` are registered; afterwards they are removed."""
    registered = list(hooks)
    try:
        yield
    finally:
        for hook in registered:
            hook.remove()


def states_of(model: nn.Module) -> list[State]:
    """Every state in `model` (a bare network, or a wrapper around one), each once."""
    found: dict[int, State] = {}
    for module in model.modules():
        for holder in (module, *(getattr(module, seam, None) for seam in SEAMS)):
            state = getattr(holder, "state", None)
            if isinstance(state, State):
                found[id(state)] = state
    return list(found.values())


def state_bytes(model: nn.Module, *, beside: Container[int] = ()) -> int:
    """Bytes of membranes, traces, and what slices share with its gradient, each storage once; 0
    outside `fresh_state`.

    Those `beside` storages that are counted already, each by its `_cdata`: a trace is what backward
    keeps as well."""
    values = (value for state in states_of(model) for value in state.values.values())
    storages = {value.untyped_storage()._cdata: value.untyped_storage() for value in values}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in beside)
