"""Online Training Through Time: weights learn from a trace, without a graph over time."""

# T time, B batch, K classes

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Literal

from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts, refuse_unless_one_of, require
from pipeline.rules.base import (
    LossOf,
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

    x[t] is the synapse's input and u[t] the potential that it feeds (`spiking/neuron.py`). If the
    reset subtracts a constant, du[t]/dW = a[t]. So the last weight before a LIF gets its exact BPTT
    gradient, and other weights get the product of three local factors: trace, surrogate, error from
    above. Biases see the constant 1 without a trace. First and last synapse are those in order of
    registration; the first slice must run them in these places.

    Args:
        decay: of the traces; must equal the neurons' shared decay. None takes it from the model.
        update: "batch" is OTTT-A; "step" is OTTT-O, which updates the weights at every time step.
        first: "plain" gives the first synapse, which sees the data, no trace, as published.
        readout: "plain" gives the last synapse no trace. No membrane follows it, so its plain
            gradient is that of BPTT (published: traced in VGG, plain in NF-ResNet).
        chunk: steps that share one forward and one backward: more memory, better use of the device,
            the same gradient.

    Raises: ValueError for chunk below 1, and chunk > 1 with update="step" (when made); for a loss
    over mean logits, batch norm, no neurons, several or learnt decays, a `decay` that differs from
    theirs, weight layers of torch (`attach`); for chunk above T (`check_steps`); for a first or
    last synapse that runs in another place (`loss_terms`).
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
            "OTTT: update='step' moves the weights at every step, so chunk must be 1; got"
            f" chunk={chunk}",
        )
        self.decay = decay
        self.update = update
        self.first = first
        self.readout = readout
        self.chunk = chunk
        self._order_is_known = False
        self.label = "OTTT-A" if update == "batch" else "OTTT-O"

    def attach(
        self, model: nn.Module, *, world: World = World(), over_time: OverTime = "steps"
    ) -> None:
        refuse_batch_norm(self.label, model)
        decay = shared_decay(self.label, model, self.decay)
        synapses = traceable_synapses(self.label, model)
        super().attach(model, world=world, over_time=over_time)
        detach_between_steps(self, model)
        self._order_is_known = False
        start = 1 if self.first == "plain" else 0
        end = -1 if self.readout == "plain" else None
        for synapse in list(synapses.values())[start:end]:
            self.set_seam(synapse, "presynaptic", Trace(decay))

    def _loss_terms(
        self, model: nn.Module, x_TB: Tensor, loss_of: LossOf, step: int, rows: Sequence[int]
    ) -> Iterator[LossTerm]:
        steps = x_TB.shape[0]
        last = (steps - 1) // (self.chunk or steps)
        # Under OTTT-O the weights change at every step, so no module gets the cache.
        caching = (
            slice_cache(model, steps=steps, backwards="several")
            if self.update == "batch"
            else nullcontext(SliceCache(steps=steps, backwards="several"))
        )
        with fresh_state(model), caching as cache:
            for index, x_cB in enumerate(slices(x_TB, self.chunk)):
                cache.is_last = index == last
                logits_TBK = model(x_cB) if self._order_is_known else self._checked(model, x_cB)
                loss, share_BK = slice_loss(logits_TBK, loss_of, steps=steps)
                yield LossTerm(
                    backward=cache.with_gradients(loss),
                    loss=loss.detach(),
                    logits=share_BK,
                )

    def _checked(self, model: nn.Module, x_cB: Tensor) -> Tensor:
        """The logits of the first slice.

        The synapses must run in their order, and once per time step.
        """
        synapses = traceable_synapses(self.label, self._attached[0])
        names = list(synapses)
        with running_order(synapses) as ran:
            logits_TBK = model(x_cB)
        for name in names:
            require(
                ran.count(name) <= len(x_cB),
                f"{self.label}: a synapse must run once in a time step, because its trace is of one"
                f" input; got {name}, which ran {ran.count(name)} times in {len(x_cB)}",
            )
        for what, choice, place in (("first", self.first, 0), ("readout", self.readout, -1)):
            require(
                choice != "plain" or ran[place] == names[place],
                f"{self.label}: {what}='plain' means {names[place]}, by order of registration,"
                f" but {ran[place]} ran in its place; register the synapses in the order in"
                f" which they run, or set {what}='traced'",
            )
        self._order_is_known = True
        return logits_TBK
