"""The neuron of a wrapped network: a LIF with the call convention of another package."""

# T time, B batch

import math
from functools import partial
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pipeline.core.checks import require
from pipeline.models.foreign.equal_lif import Equal
from pipeline.spiking.neuron import LIF


class Token:
    """Stands for the state of a neuron, which is inside `fresh_state`.

    It has no value, except the attribute `v` if membranes are recorded.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def _refuse(self, *_: Any) -> NoReturn:
        raise ValueError(
            f"wrap: the network must only pass on the state of {self.name}; to use the membrane,"
            " wrap with output='membrane' or the index of the output that has it"
        )

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # copying and pickling ask for special methods
            raise AttributeError(attribute)
        self._refuse()

    @classmethod
    def __torch_function__(cls, _: Any, __: Any, args: Any = (), ___: Any = None) -> NoReturn:
        next(each for each in tree_leaves(args) if isinstance(each, cls))._refuse()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _refuse
    __neg__ = __getitem__ = __iter__ = __gt__ = __ge__ = __lt__ = __le__ = _refuse


class ForeignNeuron(nn.Module):
    """A LIF in the place of a neuron of another package.

    The input and output are those of the package: `x` or `(x, state)` to `s` or `(s, state)`, with
    one time step `[B, ...]` per call, or all of them if `has_time`. The state must be passed on as
    it was returned, and be None at first.

    Args:
        name: the name of the neuron in the user's network.
        equal: the LIF, and what the package returns.
        ran: shared by all neurons of a network, which append themselves.
        has_time: see above.
        none_continues: whether the state None means the last state of the neuron.
        records: whether the membranes are recorded, with their graph, as the package returns them.

    Raises: ValueError if the neuron runs more than `runs_left` times, or for another state.
    """

    def __init__(
        self,
        name: str,
        equal: Equal,
        ran: list[Any],
        *,
        has_time: bool,
        none_continues: bool,
        records: bool,
    ) -> None:
        super().__init__()
        self.name, self.lif, self.returns_state = name, equal.lif, equal.returns_state
        self.ran = ran
        self.has_time = has_time
        self.none_continues = none_continues
        self.runs_left: float = math.inf  # for a module that runs alone, as in `check`
        self.recorded: list[Tensor] = []
        self.token: Any = Token(name)
        if records:
            self.lif.kernel = "eager"
            step = partial(_recorded_step, self.lif, self.recorded, equal)
            self.lif.step = step  # type: ignore[method-assign]

    def forward(self, x: Tensor, *states: Any, **named_states: Any) -> Any:
        (state,) = (*states, *named_states.values()) or (None,)
        is_first = self.lif.state.read("v") is None
        self._require_unchanged(
            is_first or self.none_continues
            if state is None
            else state is self.token and not is_first
        )
        require(
            self.runs_left > 0,
            f"wrap: a neuron must run once in a call of the network; got another run of"
            f" {self.name}; take the loop over time out of the network's forward, which gets one"
            " time step per call, and give each place a neuron of its own",
        )
        self.runs_left -= 1
        self.ran.append(self)
        s = self.lif(x) if self.has_time else self.lif(x.unsqueeze(0)).squeeze(0)
        state: Any = Token(self.name)
        self.token = state
        if self.recorded:
            # The LIF has a time axis in a slice of one step.
            self.recorded[-1] = state.v = self.recorded[-1].view(x.shape[self.has_time :])
            state = state.v if self.none_continues else state
        return (s, state) if self.returns_state else s

    def reset(self) -> None:
        """As in the package. Outside `fresh_state` there is nothing to reset.

        Raises: ValueError after the first time step of a batch.
        """
        state = self.lif.state
        self._require_unchanged(not state.is_open or state.read("v") is None)

    reset_mem = init_leaky = reset

    def _require_unchanged(self, is_unchanged: bool) -> None:
        require(
            is_unchanged,
            f"wrap: the network changes or resets the state of {self.name}; it must pass the state"
            " that this neuron returned last, and None at the first time step of a batch;"
            " fresh_state clears states",
        )

    def forget(self) -> None:
        """Drop recorded membranes, which would keep their graph."""
        self.recorded.clear()
        self.token.__dict__.pop("v", None)
        self.runs_left = math.inf


def _recorded_step(
    lif: LIF, recorded: list[Tensor], equal: Equal, x_B: Tensor, v_B: Tensor
) -> tuple[Tensor, Tensor]:
    s_B, new_v_B = type(lif).step(lif, x_B, v_B)
    recorded.append((lif.charge(x_B, v_B) if equal.returns_u else new_v_B) + equal.rest)
    return s_B, new_v_B
