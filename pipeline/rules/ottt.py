"""Online Training Through Time: gradients from input traces, without a graph over time."""

# T time, B batch, K classes

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Literal

from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts, refuse_unless_one_of, require
from pipeline.rules.base import (
    LossFn,
    LossTerm,
    OverTime,
    Rule,
    World,
    detach_between_steps,
    slice_loss,
    slices,
)
from pipeline.spiking.slice_cache import SliceCache, slice_cache
from pipeline.spiking.state import fresh_state
from pipeline.spiking.trace import (
    Trace,
    refuse_batch_norm,
    running_order,
    shared_decay,
    traceable_synapses,
)


class OTTT(Rule):
    """The membrane is detached between time steps, and a trace of the input gives the gradient.

        a[t] = decay a[t-1] + x[t],   a[0] = 0
        grad W = 1/T sum_t g[t] a[t]^T,   g[t] = dL[t]/du[t] within step t

    x[t] is the synapse's input, and u[t] is the membrane before the reset in the next neurons
    (`spiking/neuron.py`). If the reset subtracts and is detached, du[t]/dW = a[t]. So the last
    synapse before a LIF gets exactly the gradient of BPTT. The gradient of other synapses is the
    product of three factors: trace, surrogate derivative and backpropagated error. Biases have no
    trace.

    Args:
        decay: the decay of the traces, which must be the decay of all neurons; None: taken from the
            model.
        update: "batch" is OTTT-A. "step" is OTTT-O, which updates the weights at every time step.
        first: with "plain", the first synapse has no trace, as published. Its input is the data.
        readout: with "plain", the last synapse has no trace. No neuron follows this synapse, so
            its gradient is that of BPTT. (Published: traced in VGG, plain in NF-ResNet.)
        chunk: the number of time steps per forward and backward. A larger chunk needs more memory
            and is faster on most devices. The gradient is the same.

    With "plain", the first or last synapse in order of registration must also be the first or last
    to run.

    Raises: ValueError for an unknown choice, chunk below 1, or chunk > 1 with update="step"
    (`__init__`); for a loss over mean logits, batch norm, no neurons, different or learnt decays, a
    `decay` that differs from the neurons', or linear layers and convolutions of torch (`attach`);
    for chunk above T (`check_steps`); for a first or last synapse that runs in another place, or a
    synapse that runs twice in a step (`loss_terms`).
    Source: Xiao et al. 2022 (arXiv 2210.04195), eq. 6-8 and section 4.3.
    """

    memory = "constant"

    def __init__(
        self,
        decay: float | None = None,
        *,
        update: Literal["batch", "step"] = "batch",
        first: Literal["plain", "traced"] = "plain",
        readout: Literal["plain", "traced"] = "traced",
        chunk: int = 1,
    ) -> None:
        super().__init__()
        refuse_unless_one_of("OTTT", ("batch", "step"), update=update)
        refuse_unless_one_of("OTTT", ("plain", "traced"), first=first, readout=readout)
        refuse_unless_counts("OTTT", {"chunk": chunk}, up_to="T")
        require(
            update != "step" or chunk <= 1,
            "OTTT: chunk must be 1 with update='step', which updates the weights at every step; got"
            f" chunk={chunk}",
        )
        self.decay = decay
        self.update = update
        self.first = first
        self.readout = readout
        self.chunk = chunk
        self._is_order_checked = False
        self.label = "OTTT-A" if update == "batch" else "OTTT-O"

    def attach(
        self, model: nn.Module, *, world: World = World(), over_time: OverTime = "steps"
    ) -> None:
        refuse_batch_norm(self.label, model)
        decay = shared_decay(self.label, model, self.decay)
        synapses = traceable_synapses(self.label, model)
        super().attach(model, world=world, over_time=over_time)
        detach_between_steps(self, model)
        self._is_order_checked = False
        start = 1 if self.first == "plain" else 0
        end = -1 if self.readout == "plain" else None
        for synapse in list(synapses.values())[start:end]:
            self.set_seam(synapse, "presynaptic", Trace(decay))

    def _loss_terms(
        self, model: nn.Module, x_TB: Tensor, loss_fn: LossFn, step: int, rows: Sequence[int]
    ) -> Iterator[LossTerm]:
        steps = x_TB.shape[0]
        last_slice = (steps - 1) // (self.chunk or steps)
        # Under OTTT-O the weights change at every step, so no module uses the cache.
        cache_context = (
            slice_cache(model, steps=steps, backwards="several")
            if self.update == "batch"
            else nullcontext(SliceCache(steps=steps, backwards="several"))
        )
        with fresh_state(model), cache_context as cache:
            for index, x_cB in enumerate(slices(x_TB, self.chunk)):
                cache.is_last = index == last_slice
                logits_cBK = model(x_cB) if self._is_order_checked else self._checked(model, x_cB)
                loss, logits_BK = slice_loss(logits_cBK, loss_fn, steps=steps)
                yield LossTerm(
                    backward=cache.with_gradients(loss), loss=loss.detach(), logits=logits_BK
                )

    def _checked(self, model: nn.Module, x_cB: Tensor) -> Tensor:
        """The logits of the first slice, after a check of the order in which the synapses run.

        Raises: ValueError for a synapse that runs twice in a time step, or for a first or last
        synapse that runs in another place.
        """
        synapses = traceable_synapses(self.label, self._attached[0])
        names = list(synapses)
        with running_order(synapses) as order:
            logits_cBK = model(x_cB)
        for name in names:
            require(
                order.count(name) <= len(x_cB),
                f"{self.label}: a synapse must run once in a time step, because its trace has one"
                f" input; got {order.count(name)} runs of {name} in {len(x_cB)} steps",
            )
        for argument, choice, index in (("first", self.first, 0), ("readout", self.readout, -1)):
            require(
                choice != "plain" or order[index] == names[index],
                f"{self.label}: {argument}='plain' applies to {names[index]}, by the order of"
                f" registration; got {order[index]}, which runs in its place; register the synapses"
                f" in the order in which they run, or set {argument}='traced'",
            )
        self._is_order_checked = True
        return logits_cBK
