"""Online Training Through Time: what a synapse saw before stays in a trace, and the weight learns from the trace."""

# T time, B batch, K classes

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from pipeline.rules.base import (
    LossOf,
    Objective,
    OverTime,
    Rule,
    World,
    cut_in_time,
    named_neurons,
    slices,
    steps_share,
)
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.state import State, fresh_state
from pipeline.spiking.synapse import Conv2d, Linear


class OTTT(Rule):
    """OTTT: the membrane that crosses a time step is a constant, and a weight's gradient takes the trace of its input.

        a[t] = leak a[t-1] + x[t],   a[0] = 0        grad W = 1/T sum_t g[t] a[t]^T,   g[t] = dL[t]/du[t] within step t

    with x[t] the synapse's input and u[t] the potential that it feeds (`spiking/neuron.py`). As du[t]/dW = a[t] where the
    reset is a constant that is subtracted, the last weight that feeds a LIF learns exactly as under BPTT, any other by the
    product of three local factors: trace, surrogate, error from above. Biases see the constant 1 without a trace.

    The trace forgets as the neuron that it feeds does: `leak=None` takes the leak that all neurons of the model share; a
    number must be that leak. `update="batch"` is OTTT-A, `"objective"` OTTT-O: the weights move at every time step.
    `first="plain"` gives the first synapse, which sees the data, no trace, as published; `readout="plain"` the last, behind
    which no membrane integrates, so that its plain gradient is BPTT's (published: traced in VGG, plain in NF-ResNet). First
    and last are those in order of registration; the first slice that runs must run them in these places.
    `chunk` steps share one forward and one backward: more memory, fuller devices, the same gradient.

    Raises: ValueError for chunk below 1, and chunk > 1 with update="objective" (when made); for a loss over mean logits,
    batch norm, no neurons or several leaks, a leak that is not theirs, layers of torch where a synapse is due (`attach`);
    for chunk above T (`check_steps`); for a first or last synapse that is run in another place (`objectives`).
    Source: Xiao et al. 2022 (arXiv 2210.04195), eq. 6-8 and section 4.3.
    """

    memory = "constant"

    def __init__(
        self,
        leak: float | None = None,
        *,
        update: Literal["batch", "objective"] = "batch",
        first: Literal["plain", "traced"] = "plain",
        readout: Literal["plain", "traced"] = "traced",
        chunk: int = 1,
    ) -> None:
        super().__init__()
        if update not in ("batch", "objective"):
            raise ValueError(f"OTTT: update must be 'batch' or 'objective'; got update={update!r}")
        for name, value in (("first", first), ("readout", readout)):
            if value not in ("plain", "traced"):
                raise ValueError(f"OTTT: {name} must be 'plain' or 'traced'; got {name}={value!r}")
        if chunk < 1:
            raise ValueError(f"OTTT: chunk must be in 1..T; got chunk={chunk}")
        if update == "objective" and chunk > 1:
            raise ValueError(f"OTTT: update='objective' moves the weights at every step, so chunk must be 1; got chunk={chunk}")
        self.leak = leak
        self.update = update
        self.first = first
        self.readout = readout
        self.chunk = chunk
        self._order_is_known = False

    @property
    def label(self) -> str:
        return "OTTT-A" if self.update == "batch" else "OTTT-O"

    def attach(self, model: nn.Module, *, world: World = World(), over_time: OverTime = "steps") -> None:
        refuse_batch_norm(self, model)
        leak = self._leak_of(model)
        synapses = self._synapses_of(model)
        super().attach(model, world=world, over_time=over_time)
        cut_in_time(self, model)
        self._order_is_known = False
        plain = self._plain(list(synapses))
        for name, synapse in synapses.items():
            if name not in plain:
                self.set_seam(synapse, "presynaptic", Trace(leak))

    def check_steps(self, steps: int) -> None:
        if self.chunk > steps:
            raise ValueError(f"OTTT: chunk must be in 1..T; got chunk={self.chunk}, T={steps}")

    def _objectives(self, model: nn.Module, x_TB: Tensor, loss_of: LossOf, step: int, rows: Sequence[int]) -> Iterator[Objective]:
        steps = x_TB.shape[0]
        with fresh_state(model):
            for x_cB in slices(x_TB, self.chunk):
                logits_TBK = model(x_cB) if self._order_is_known else self._checked(model, x_cB)
                loss, share_BK = steps_share(logits_TBK, loss_of, steps=steps)
                yield Objective(backward=loss, loss=loss.detach(), logits=share_BK)

    def _leak_of(self, model: nn.Module) -> float:
        leaks = {name or "the model itself": neuron.leak for name, neuron in named_neurons(model)}
        if not leaks:
            raise ValueError(
                f"{self.label}: the model must have LIF neurons, whose leak a trace shares; got {type(model).__name__}"
            )
        others = {name: leak for name, leak in leaks.items() if leak != self.leak}
        if self.leak is not None and others:
            raise ValueError(
                f"{self.label}: leak must be that of the neurons, which the traces feed; got {self.leak} and {_listed(others)}"
            )
        if len(set(leaks.values())) > 1:
            raise ValueError(f"{self.label}: the neurons must share one leak, which the traces take; got {_listed(leaks)}")
        return next(iter(leaks.values()))

    def _synapses_of(self, model: nn.Module) -> dict[str, Linear | Conv2d]:
        """By module name, in order of registration."""
        found = {}
        for name, module in model.named_modules():
            if isinstance(module, (Linear, Conv2d)):
                found[name] = module
            elif isinstance(module, (nn.Linear, _ConvNd)):
                raise ValueError(
                    f"{self.label}: the layers with weights must be of pipeline.spiking.synapse, which holds the traces; "
                    f"got torch's {type(module).__name__} at {name}"
                )
        if not found:
            raise ValueError(f"{self.label}: the model must have synapses, which hold the traces; got {type(model).__name__}")
        return found

    def _plain(self, names: Sequence[str]) -> set[str]:
        """The synapses without a trace."""
        return {name for name, choice in ((names[0], self.first), (names[-1], self.readout)) if choice == "plain"}

    def _checked(self, model: nn.Module, x_cB: Tensor) -> Tensor:
        """The logits of the first slice, whose run must confirm which synapse is first, which last, and that each runs once."""
        synapses = self._synapses_of(self._attached[0])
        names = list(synapses)
        with running_order(synapses) as ran:
            logits_TBK = model(x_cB)
        for name in names:  # a whole slice at once, or its steps one by one as where features are fed back
            if (count := ran.count(name)) not in (0, 1, len(x_cB)):
                raise ValueError(
                    f"{self.label}: a synapse must run once in a time step, because its trace is of one input; "
                    f"got {name}, which ran {count} times in {len(x_cB)}"
                )
        for what, choice, place in (("first", self.first, 0), ("readout", self.readout, -1)):
            if choice == "plain" and ran[place] != names[place]:
                raise ValueError(
                    f"{self.label}: {what}='plain' means {names[place]}, by order of registration, but {ran[place]} ran in its "
                    f"place; register the synapses in the order in which they run, or set {what}='traced'"
                )
        self._order_is_known = True
        return logits_TBK


class Trace:
    """The seam `presynaptic` under OTTT: x[t] -> a[t] = leak a[t-1] + x[t], without a graph and never below fp32."""

    def __init__(self, leak: float) -> None:
        self.leak = leak
        self.state = State("Trace")

    @torch.no_grad()
    def __call__(self, x_TB: Tensor) -> Tensor:
        a_B = self.state.read("a")
        # A tensor of its own from the first step on: the factor must not be x itself.
        a_TB = torch.empty_like(x_TB, dtype=torch.promote_types(x_TB.dtype, torch.float32))
        for t, x_B in enumerate(x_TB.unbind(0)):
            a_B = a_TB[t].copy_(x_B) if a_B is None else torch.add(x_B, a_B, alpha=self.leak, out=a_TB[t])
        # What is remembered beyond the slice holds one step, not the slice.
        self.state.write("a", a_TB[-1] if len(a_TB) == 1 else a_TB[-1].clone())
        return a_TB


def refuse_batch_norm(rule: Rule, model: nn.Module) -> None:
    """A normalised current is no sum over past inputs any more, so no trace can stand for it.

    Raises: ValueError that names every batch norm of `model`.
    """
    names = [name or "the model itself" for name, module in model.named_modules() if isinstance(module, (BatchNorm, _BatchNorm))]
    if names:
        raise ValueError(
            f"{rule.label}: a trace cannot pass batch norm; standardise the weights instead (weights='standardized'); "
            f"got batch norm at {', '.join(names)}"
        )


@contextmanager
def running_order(modules: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Fills with the names of `modules` as they run."""
    ran: list[str] = []

    def note(name: str, *_: object) -> None:
        ran.append(name)

    hooks = [module.register_forward_pre_hook(partial(note, name)) for name, module in modules.items()]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def _listed(leaks: dict[str, float]) -> str:
    return ", ".join(f"{leak:g} at {name}" for name, leak in leaks.items())
