"""A network that feeds back into itself until its firing rates come to rest, and its gradient at
rest.

    first layer    c_1[t] = inject(x[t]) + feedback(s_N[t-1]),     s_1[t] = neuron_1(c_1[t])
    (s_N[0] = 0) layer l        c_l[t] = synapse_l(s_{l-1}[t]),                 s_l[t] =
    neuron_l(c_l[t])          l = 2..N

The (weighted) firing rate of the last layer, a[T] = sum_t decay^(T-t) s_N[t] / sum_t decay^(T-t),
approaches a fixed point

    a* = f(a*),    f = f_N o ... o f_1,    f_1(a) = rate(inject(x*) + feedback(a)),    f_l(z) =
    rate(synapse_l(z)), rate(c) = clamp(c / subtract, 0, 1)

with x* the same weighted mean of the input, as 1/T for IF (decay 1) and up to a remainder that time
does not remove for LIF.

Source: Xiao et al. 2021 (IDE, arXiv 2109.14247); Bai et al. 2019 (arXiv 1909.01377) for the
implicit gradient."""

# T time, B batch, N layers; v_B and the like are [B, ...] in the shape of the last layer

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.spiking.encode import is_static
from pipeline.spiking.neuron import LIF, PLIF, identity, named_neurons
from pipeline.spiking.norm import batch_norms
from pipeline.spiking.op_scope import op_scope
from pipeline.spiking.rate import RateNeuron
from pipeline.spiking.state import State, attribute_set

Adjoint = Callable[[Tensor, "Linearized"], "Tensor | Sequence[Tensor]"]


class Equilibrium(nn.Module):
    """The equations at the head of the file: inputs `[T, B, ...]` to `[T, B, ...]` in the shape of
    the last layer.

    `inject` and `synapses` (N - 1 of them, layer l to l + 1) are affine in evaluation, such as a
    synapse with batch norm; `feedback`, from the last layer to the first, is linear. `neurons` are
    N LIFs of one decay that reset by subtraction.

    What comes out at step t is t a[t] - (t-1) a[t-1] (the spikes, for IF): its mean over time is
    the rate a[T], whatever T and however it is sliced, so that the mean over T of an affine readout
    of it is the readout of a[T].

    As it stands this is a recurrent network, unrolled with its graph (BPTT). Two seams for rules:
    `carry` is applied to what crosses a time step; and `adjoint(g_B, vjp) -> beta_B`, where set,
    replaces backpropagation through time when a gradient is wanted. The simulation then has no
    graph, its output is a[T] alone, as one step `[1, B, ...]`, and

        the gradient g = dL/da[T] that arrives is replaced by what `adjoint` makes of it, a solution
        of beta = g + J^T beta with J = df/da at a[T], and beta goes on through one application of f
        at a[T] into its parameters and its input.

    `vjp` is a `Linearized`: v_B -> J^T v_B, and each layer's part of it. Where `adjoint` returns N
    tensors, one for each layer's rate, each layer of f takes its own in the place of what the layer
    behind it would hand down.

    Batch norm inside is evaluated, not trained, during such a simulation and in J; its statistics
    and its batch gradient come from the one application of f. An input that is the same at every
    step (`encode.repeat`) is injected once, for both: by the batch's statistics. The frames of a
    recording are injected by the running ones in the simulation and, as their mean, by the batch's
    in f, so a[T] is f's only as far as the two agree.

    Raises: ValueError for neurons that have no such rate, a feedback with bias, or a wrong number
    of synapses; with an adjoint, for a batch that comes in slices.
    """

    def __init__(
        self,
        *,
        inject: nn.Module,
        feedback: nn.Module,
        neurons: Sequence[nn.Module],
        synapses: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        if len(neurons) < 1 or len(synapses) != len(neurons) - 1:
            raise ValueError(
                f"Equilibrium: N neurons need N - 1 synapses between them; got {len(neurons)}"
                f" neurons, {len(synapses)} synapses"
            )
        self.decay, self.divisors = _check_neurons(neurons)
        _check_linear(feedback)
        self.inject = inject
        self.feedback = feedback
        self.synapses = nn.ModuleList(synapses)
        self.neurons = nn.ModuleList(neurons)
        self.carry: Callable[[Tensor], Tensor] = identity
        self.adjoint: Adjoint | None = None
        self.state = State("Equilibrium")

    def forward(self, x_TB: Tensor) -> Tensor:
        if self.adjoint is not None and torch.is_grad_enabled():
            return self._implicit(x_TB, self.adjoint)
        return torch.cat([self._step(current_1B) for current_1B in self.inject(x_TB).split(1)])

    def rate(self, layer: int, current_1B: Tensor) -> Tensor:
        """clamp(c / subtract, 0, 1), whose derivative is 1 / subtract strictly inside."""
        return F.hardtanh(current_1B / self.divisors[layer], 0.0, 1.0)

    def _step(self, current_1B: Tensor) -> Tensor:
        """One time step: the current that `inject` gives to t a[t] - (t-1) a[t-1]."""
        before_1B = self.state.read("spikes")
        if before_1B is not None:
            current_1B = current_1B + self.feedback(before_1B)
        s_1B = self.neurons[0](current_1B)
        for synapse, neuron in zip(self.synapses, self.neurons[1:], strict=True):
            s_1B = neuron(synapse(s_1B))
        self.state.write("spikes", self.carry(s_1B))
        return self._count(s_1B)

    def _count(self, s_1B: Tensor) -> Tensor:
        """Add the spikes to the running sum_t decay^(T-t) s[t]."""
        sum_1B, steps = self.state.read("sum"), self.state.read("steps")
        t = 1 if steps is None else int(steps) + 1
        wide_1B = s_1B.to(torch.promote_types(s_1B.dtype, torch.float32))
        now_1B = wide_1B if sum_1B is None else torch.add(wide_1B, sum_1B, alpha=self.decay)
        self.state.write("sum", self.carry(now_1B))
        self.state.write("steps", torch.tensor(t))
        if self.decay == 1:
            return s_1B
        out_1B = now_1B * (t / _total(self.decay, t))
        if sum_1B is not None:
            out_1B = torch.sub(out_1B, sum_1B, alpha=(t - 1) / _total(self.decay, t - 1))
        return out_1B.to(s_1B.dtype)

    def _implicit(self, x_TB: Tensor, adjoint: Adjoint) -> Tensor:
        if self.state.read("steps") is not None:
            raise ValueError(
                "Equilibrium: with an adjoint a batch is one call on all T steps; got a second"
                " slice of it"
            )
        same = x_TB.shape[0] == 1 or is_static(x_TB)
        current_1B = self.inject(x_TB[:1] if same else weighted_mean(x_TB, self.decay))
        with torch.no_grad(), norms_in_eval(self):
            a_1B = self._simulate(x_TB, current_1B if same else None)
        return self._at_rest(a_1B, current_1B, adjoint)

    def _simulate(self, x_TB: Tensor, current_1B: Tensor | None) -> Tensor:
        """a[T]; `current_1B` is what `inject` gives at every step, None where it has to be
        asked.
        """
        for x_1B in x_TB.split(1):
            self._step(self.inject(x_1B) if current_1B is None else current_1B)
        sum_1B = self.state.read("sum")
        assert sum_1B is not None
        return sum_1B / _total(self.decay, x_TB.shape[0])

    def _at_rest(self, a_1B: Tensor, current_1B: Tensor, adjoint: Adjoint) -> Tensor:
        """`a_1B` as the value, and as the gradient the adjoint's, through f at `a_1B`."""
        betas: list[Tensor] = []
        z_1B = self.rate(0, current_1B + self.feedback(a_1B))
        for layer, synapse in enumerate(self.synapses, start=1):
            z_1B = self.rate(layer, synapse(_LayerGradient.apply(z_1B, betas, layer - 1)))
        return _ImplicitGradient.apply(z_1B, a_1B, current_1B, self, adjoint, betas)  # type: ignore[return-value]


def find_equilibrium(who: str, model: nn.Module) -> Equilibrium:
    """The one equilibrium of `model`, which holds all its neurons.

    Raises: ValueError, in the name of `who`, that says what the model has instead.
    """
    found = [
        (name, module) for name, module in model.named_modules() if isinstance(module, Equilibrium)
    ]
    if len(found) != 1:
        what = (
            " and ".join(name or type(module).__name__ for name, module in found)
            or f"none in {type(model).__name__}"
        )
        raise ValueError(
            f"{who}: the model must have one equilibrium, whose rates are differentiated; got"
            f" {what}"
        )
    inside = {id(neuron) for _, neuron in named_neurons(found[0][1])}
    outside = [name for name, neuron in named_neurons(model) if id(neuron) not in inside]
    if outside:
        raise ValueError(
            f"{who}: every neuron must be part of the equilibrium; got {', '.join(outside)}"
            " outside it"
        )
    return found[0][1]


class Linearized:
    """J = df/da at rates `a_1B`, with constant parameters and batch norm in evaluation:
    `linearized(v_B)` is J^T v_B.

    `synapses[l]` is the synapse into layer l (l = 0: the feedback); `masks[l]` is 1 where layer l's
    rate lies strictly between 0 and 1, else 0; `divisors[l]` its neurons' `subtract`.
    `transposed(l, d_B)` is the transposed synapse into layer l: from a gradient of layer l's
    current to that of the rate which feeds it. So, from the last layer to the first,  v <-
    transposed(l, masks[l] v / divisors[l]).

    No gradient reaches a parameter from here, and no hook of one is run.
    """

    def __init__(self, equilibrium: Equilibrium, a_1B: Tensor, current_1B: Tensor) -> None:
        self.synapses = [equilibrium.feedback, *equilibrium.synapses]
        self.divisors = equilibrium.divisors
        self.masks: list[Tensor] = []
        self._maps: list[tuple[Tensor, Tensor]] = []
        rate_1B = a_1B
        with torch.enable_grad(), norms_in_eval(equilibrium):
            for layer, synapse in enumerate(self.synapses):
                input_1B = rate_1B.detach().requires_grad_()
                output_1B = synapse(input_1B)
                self._maps.append((input_1B, output_1B))
                total_1B = (
                    output_1B.detach() + current_1B.detach() if layer == 0 else output_1B.detach()
                )
                rate_1B = equilibrium.rate(layer, total_1B)
                self.masks.append(((rate_1B > 0) & (rate_1B < 1)).to(rate_1B.dtype).squeeze(0))

    def __call__(self, v_B: Tensor) -> Tensor:
        return self.backwards(v_B)[-1]

    def backwards(self, v_B: Tensor) -> list[Tensor]:
        """`v_B` handed down from the last layer's rate: to layer N - 1's, ..., layer 1's, and
        through the feedback, J^T v.
        """
        found = []
        for layer in reversed(range(len(self.masks))):
            v_B = self.transposed(layer, self.masks[layer] * v_B / self.divisors[layer])
            found.append(v_B)
        return found

    def transposed(self, layer: int, d_B: Tensor) -> Tensor:
        input_1B, output_1B = self._maps[layer]
        (v_1B,) = torch.autograd.grad(output_1B, input_1B, d_B.unsqueeze(0), retain_graph=True)
        return v_1B.squeeze(0)


def weighted_mean(x_TB: Tensor, decay: float) -> Tensor:
    """sum_t decay^(T-t) x[t] / sum_t decay^(T-t) as one step, `[1, B, ...]`."""
    steps = x_TB.shape[0]
    weights = [decay ** (steps - 1 - t) / _total(decay, steps) for t in range(steps)]
    mean_B = weights[0] * x_TB[0]
    for t in range(1, steps):
        mean_B = torch.add(mean_B, x_TB[t], alpha=weights[t])
    return mean_B.unsqueeze(0)


def norms_in_eval(model: nn.Module) -> AbstractContextManager[None]:
    """Batch norm under `model` uses its running statistics, and leaves them alone; everything else
    stays as it is.
    """
    return attribute_set(batch_norms(model), "training", False)


class _LayerGradient(torch.autograd.Function):
    """Identity; backward, the layer's own solution where the adjoint gave one for each layer."""

    @staticmethod
    def forward(ctx: Any, z_1B: Tensor, betas: list[Tensor], layer: int) -> Tensor:
        ctx.betas, ctx.layer = betas, layer
        return z_1B.view_as(z_1B)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return (ctx.betas[ctx.layer].unsqueeze(0) if ctx.betas else grad_outputs[0]), None, None


class _ImplicitGradient(torch.autograd.Function):
    """The value a[T] with the graph of f(a[T]); backward, the adjoint's solution in the place of
    the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z_1B: Tensor,
        a_1B: Tensor,
        current_1B: Tensor,
        equilibrium: Equilibrium,
        adjoint: Adjoint,
        betas: list[Tensor],
    ) -> Tensor:
        ctx.save_for_backward(a_1B, current_1B)
        ctx.equilibrium, ctx.adjoint, ctx.betas = equilibrium, adjoint, betas
        return a_1B.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        a_1B, current_1B = ctx.saved_tensors
        # In the precision of the rate, never below fp32: a solve is longer than bf16 is precise.
        with torch.autocast(a_1B.device.type, enabled=False), op_scope("solver"):
            solved = ctx.adjoint(
                grad_outputs[0].squeeze(0),
                Linearized(ctx.equilibrium, a_1B, current_1B.to(a_1B.dtype)),
            )
        if isinstance(solved, Tensor):
            return solved.unsqueeze(0), None, None, None, None, None
        ctx.betas[:] = solved
        return solved[-1].unsqueeze(0), None, None, None, None, None


def _total(decay: float, steps: int) -> float:
    """sum_{t=1..steps} decay^(steps-t)."""
    return float(steps) if decay == 1 else (1 - decay**steps) / (1 - decay)


def _check_neurons(neurons: Sequence[nn.Module]) -> tuple[float, list[float]]:
    """The decay of all of them, and what a spike takes from each."""
    decays, divisors = set(), []
    for neuron in neurons:
        if not isinstance(neuron, LIF) or isinstance(neuron, (RateNeuron, PLIF)):
            raise ValueError(
                "Equilibrium: the neurons must be LIF or IF, whose rate is known; got"
                f" {type(neuron).__name__}"
            )
        if neuron.reset != "subtract" or neuron.scale_input:
            raise ValueError(
                "Equilibrium: neurons must reset by subtraction and not decay their input; "
                f"got reset={neuron.reset!r}, scale_input={neuron.scale_input}"
            )
        decays.add(neuron.decay)
        divisors.append(neuron.subtract)
    if len(decays) > 1:
        raise ValueError(
            "Equilibrium: one weighted mean is the rate of all layers, so they have one decay; got"
            f" {sorted(decays)}"
        )
    return decays.pop(), divisors


def _check_linear(feedback: nn.Module) -> None:
    for name, module in feedback.named_modules():
        if getattr(module, "bias", None) is not None:
            where = f"feedback.{name}" if name else "feedback"
            raise ValueError(
                "Equilibrium: the feedback must be linear, because it starts a step late; got a"
                f" bias in {where}: give it to inject"
            )
