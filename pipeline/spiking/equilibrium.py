"""A feedback network whose firing rates approach an equilibrium, and the gradient at equilibrium.

    first layer    c_1[t] = inject(x[t]) + feedback(s_N[t-1]),   s_1[t] = neuron_1(c_1[t])
                   (s_N[0] = 0)
    layer l        c_l[t] = synapse_l(s_{l-1}[t]),   s_l[t] = neuron_l(c_l[t]),   l = 2..N

The weighted firing rate of the last layer, a[T] = sum_t decay^(T-t) s_N[t] / sum_t decay^(T-t),
approaches a fixed point

    a* = f(a*),   f = f_N o ... o f_1
    f_1(a) = rate(inject(x*) + feedback(a)),   f_l(z) = rate(synapse_l(z))
    rate(c) = clamp(c / subtract, 0, 1)

where x* is the same weighted mean of the input. For IF (decay 1) the error |a[T] - a*| falls as
1/T. For LIF a part of the error remains at every T.

Source: Xiao et al. 2021 (IDE, arXiv 2109.14247); Bai et al. 2019 (arXiv 1909.01377) for the
implicit gradient.
"""

# T time, B batch, N layers; names such as v_B are [B, ...] in the shape of a layer's output

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.checks import require
from pipeline.core.torch_settings import without_autocast
from pipeline.spiking.encode import is_static
from pipeline.spiking.neuron import LIF, PLIF, identity, named_neurons
from pipeline.spiking.norm import batch_norms
from pipeline.spiking.op_scope import op_scope
from pipeline.spiking.rate import RateNeuron
from pipeline.spiking.state import State, set_temporarily

Adjoint = Callable[[Tensor, "Linearized"], "Tensor | Sequence[Tensor]"]


class Equilibrium(nn.Module):
    """The feedback network above: maps inputs `[T, B, ...]` to outputs of the last layer.

    `inject` and all `synapses` are affine in evaluation mode, such as a synapse with batch norm.
    `synapses[l]` leads from layer l to layer l + 1; here layers count from 0. `feedback`, from the
    last layer to the first, is linear. `neurons` are N LIFs that share one decay and reset by
    subtraction.

    The output at step t is t a[t] - (t-1) a[t-1]. For IF the output is the last layer's spikes.
    The mean of the outputs over time is the rate a[T], also if the T steps come in slices. So the
    mean over T of an affine readout is the readout of a[T].

    Without a rule this is a recurrent network that trains by BPTT. A rule can set two seams
    (attributes). `carry(v) -> v` is applied to the values that pass from one time step to the next.
    `adjoint(g_B, vjp) -> beta_B` replaces backpropagation through time: the simulation has no
    graph, and the output is only a[T], as one step `[1, B, ...]`. In the backward, `adjoint`
    receives the gradient g = dL/da[T] and returns the solution of beta = g + J^T beta, with
    J = df/da at a[T]. Then beta is backpropagated through one application of f at a[T], to the
    parameters and the input. Without gradients (`no_grad`), `adjoint` has no effect.

    `vjp` is a `Linearized`: it maps v_B to J^T v_B, and gives access to single layers. `adjoint`
    can also return N tensors, one per layer's rate. Then each layer of f uses its own tensor
    instead of the gradient from the layer above. If g is not finite, there is no solve: the
    backward warns, and the gradient is NaN.

    With an adjoint, batch norm uses batch statistics, and updates its running statistics, only in
    the application of f. In the simulation and in J it uses its running statistics. There are two
    cases for `inject`. A static input (`encode.repeat`) is injected once, with batch statistics,
    for both the simulation and f. A recording is injected frame by frame, with running statistics,
    in the simulation; in f its mean is injected with batch statistics. Where the simulation and f
    use different statistics, a[T] approaches a fixed point of f only if the two agree.

    Raises: ValueError for neurons that are not LIF or IF, reset to zero, scale their input or have
    different decays, for a feedback with bias, or for a wrong number of synapses; with an adjoint,
    for a batch that comes in slices.
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
        require(
            len(neurons) >= 1 and len(synapses) == len(neurons) - 1,
            "Equilibrium: there must be N >= 1 neurons and N - 1 synapses between them; got"
            f" {len(neurons)} neurons, {len(synapses)} synapses",
        )
        for neuron in neurons:
            require(
                isinstance(neuron, LIF) and not isinstance(neuron, (RateNeuron, PLIF)),
                "Equilibrium: the neurons must be LIF or IF, because their rate has a formula; got"
                f" {type(neuron).__name__}",
            )
            require(
                neuron.reset == "subtract" and not neuron.scale_input,
                "Equilibrium: the neurons must have reset='subtract' and scale_input=False; got"
                f" reset={neuron.reset!r}, scale_input={neuron.scale_input}",
            )
        decays: set[Any] = {neuron.decay for neuron in neurons}
        require(
            len(decays) == 1,
            "Equilibrium: all neurons must have the same decay, because their rates are one"
            f" weighted mean; got {sorted(decays)}",
        )
        for name, module in feedback.named_modules(prefix="feedback"):
            require(
                getattr(module, "bias", None) is None,
                "Equilibrium: the feedback must be linear, because it does not run at the first"
                f" step; got a bias in {name}; move the bias to inject",
            )
        self.decay: float = decays.pop()
        self.divisors: list[Any] = [neuron.subtract for neuron in neurons]
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
        """clamp(c / subtract, 0, 1). Its derivative is 1 / subtract strictly between 0 and 1."""
        return F.hardtanh(current_1B / self.divisors[layer], 0.0, 1.0)

    def _step(self, current_1B: Tensor) -> Tensor:
        """One time step: maps the current from `inject` to the output t a[t] - (t-1) a[t-1]."""
        last_s_1B = self.state.read("spikes")
        if last_s_1B is not None:
            current_1B = current_1B + self.feedback(last_s_1B)
        s_1B = self.neurons[0](current_1B)
        for synapse, neuron in zip(self.synapses, self.neurons[1:], strict=True):
            s_1B = neuron(synapse(s_1B))
        self.state.write("spikes", self.carry(s_1B))
        return self._add_to_rate(s_1B)

    def _add_to_rate(self, s_1B: Tensor) -> Tensor:
        """Add the spikes to the running sum_t decay^(T-t) s[t]. Returns the output of this step."""
        old_sum_1B, steps = self.state.read("sum"), self.state.read("steps")
        t = 1 if steps is None else int(steps) + 1
        sum_1B = s_1B.to(torch.promote_types(s_1B.dtype, torch.float32))
        if old_sum_1B is not None:
            sum_1B = torch.add(sum_1B, old_sum_1B, alpha=self.decay)
        self.state.write("sum", self.carry(sum_1B))
        self.state.write("steps", torch.tensor(t))
        if self.decay == 1:
            return s_1B
        out_1B = sum_1B * (t / _sum_of_powers(self.decay, t))
        if old_sum_1B is not None:
            out_1B = torch.sub(
                out_1B, old_sum_1B, alpha=(t - 1) / _sum_of_powers(self.decay, t - 1)
            )
        return out_1B.to(s_1B.dtype)

    def _implicit(self, x_TB: Tensor, adjoint: Adjoint) -> Tensor:
        require(
            self.state.read("steps") is None,
            "Equilibrium: with an adjoint, one call must have all T steps of a batch; got a second"
            " slice of the batch",
        )
        is_constant = x_TB.shape[0] == 1 or is_static(x_TB)
        current_1B = self.inject(x_TB[:1] if is_constant else weighted_mean(x_TB, self.decay))
        # Batch norm uses its running statistics, and does not update them.
        with torch.no_grad(), set_temporarily(batch_norms(self), "training", False):
            a_1B = self._simulate(x_TB, current_1B if is_constant else None)
        # The application of f at a[T]. Its value is replaced by a[T], and the gradient of its value
        # by the adjoint's solution.
        betas: list[Tensor] = []
        z_1B = self.rate(0, current_1B + self.feedback(a_1B))
        for layer, synapse in enumerate(self.synapses, start=1):
            if z_1B.requires_grad:
                z_1B.register_hook(partial(_replace_gradient, betas, layer - 1))
            z_1B = self.rate(layer, synapse(z_1B))
        return _ImplicitGradient.apply(  # type: ignore[return-value]
            z_1B, a_1B, current_1B, self, adjoint, betas
        )

    def _simulate(self, x_TB: Tensor, current_1B: Tensor | None) -> Tensor:
        """a[T]. `current_1B` is the current of a constant input; None: the input changes."""
        for x_1B in x_TB.split(1):
            self._step(self.inject(x_1B) if current_1B is None else current_1B)
        sum_1B = self.state.read("sum")
        assert sum_1B is not None
        return sum_1B / _sum_of_powers(self.decay, x_TB.shape[0])


def find_equilibrium(error_prefix: str, model: nn.Module) -> Equilibrium:
    """The only `Equilibrium` in `model`.

    Raises: ValueError for a model without an `Equilibrium`, with several, or with neurons outside
    the `Equilibrium`. The message starts with `error_prefix`.
    """
    equilibria = {
        name or type(module).__name__: module
        for name, module in model.named_modules()
        if isinstance(module, Equilibrium)
    }
    require(
        len(equilibria) == 1,
        f"{error_prefix}: the model must have exactly one Equilibrium; got"
        f" {' and '.join(equilibria) or 'none'} in {type(model).__name__}",
    )
    (equilibrium,) = equilibria.values()
    inside = set(equilibrium.modules())
    outside = [name for name, neuron in named_neurons(model) if neuron not in inside]
    require(
        not outside,
        f"{error_prefix}: every neuron must be inside the Equilibrium; got {', '.join(outside)}"
        " outside",
    )
    return equilibrium


class Linearized:
    """J = df/da at the rates `a_1B`, with constant parameters and batch norm in evaluation mode.

    `linearized(v_B)` is J^T v_B. Layers count from 0. `synapses[l]` is the synapse into layer l
    (l = 0: the feedback). `masks[l]` is 1 where the rate of layer l is strictly between 0 and 1,
    else 0. `divisors[l]` is `subtract` of its neurons. `transposed(l, d_B)` maps the gradient d_B
    of layer l's current to the gradient of the rate that is the input of `synapses[l]`. J^T is
    applied from the last layer to the first: v <- transposed(l, masks[l] v / divisors[l]).

    No gradient reaches a parameter, and no parameter hook runs.
    """

    def __init__(self, equilibrium: Equilibrium, a_1B: Tensor, current_1B: Tensor) -> None:
        self.synapses = [equilibrium.feedback, *equilibrium.synapses]
        self.divisors = equilibrium.divisors
        self.masks: list[Tensor] = []
        self._synapse_graphs: list[tuple[Tensor, Tensor]] = []  # input and output of each synapse
        rate_1B = a_1B
        with torch.enable_grad(), set_temporarily(batch_norms(equilibrium), "training", False):
            for layer, synapse in enumerate(self.synapses):
                input_1B = rate_1B.detach().requires_grad_()
                output_1B = synapse(input_1B)
                self._synapse_graphs.append((input_1B, output_1B))
                total_current_1B = output_1B.detach()
                if layer == 0:
                    total_current_1B = total_current_1B + current_1B.detach()
                rate_1B = equilibrium.rate(layer, total_current_1B)
                self.masks.append(((rate_1B > 0) & (rate_1B < 1)).to(rate_1B.dtype).squeeze(0))

    def __call__(self, v_B: Tensor) -> Tensor:
        for layer in reversed(range(len(self.masks))):
            v_B = self.transposed(layer, self.masks[layer] * v_B / self.divisors[layer])
        return v_B

    def transposed(self, layer: int, d_B: Tensor) -> Tensor:
        input_1B, output_1B = self._synapse_graphs[layer]
        (v_1B,) = torch.autograd.grad(output_1B, input_1B, d_B.unsqueeze(0), retain_graph=True)
        return v_1B.squeeze(0)


def weighted_mean(x_TB: Tensor, decay: float) -> Tensor:
    """sum_t decay^(T-t) x[t] / sum_t decay^(T-t) as one step, `[1, B, ...]`."""
    steps = x_TB.shape[0]
    weights = [decay ** (steps - 1 - t) / _sum_of_powers(decay, steps) for t in range(steps)]
    mean_B = weights[0] * x_TB[0]
    for t in range(1, steps):
        mean_B = torch.add(mean_B, x_TB[t], alpha=weights[t])
    return mean_B.unsqueeze(0)


def _replace_gradient(betas: list[Tensor], layer: int, g_1B: Tensor) -> Tensor:
    """The layer's solution in `betas` instead of the gradient `g_1B`; without solutions, `g_1B`."""
    return betas[layer].unsqueeze(0).to(g_1B.dtype) if betas else g_1B


class _ImplicitGradient(torch.autograd.Function):
    """Its value is a[T] in place of f(a[T]), and its backward passes the adjoint's solution to f.

    If the adjoint returns one solution per layer, the backward writes them to `betas`.
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
        (g_1B,) = grad_outputs
        if not g_1B.isfinite().all():
            warnings.warn(
                "Equilibrium: the gradient of the loss must be finite; got"
                f" {g_1B[~g_1B.isfinite()][0].item()}",
                RuntimeWarning,
                stacklevel=2,
            )
            return torch.full_like(g_1B, math.nan), None, None, None, None, None
        # Without autocast, because the rounding errors of bf16 add up over the iterations.
        with without_autocast(a_1B.device), op_scope("solver"):
            vjp = Linearized(ctx.equilibrium, a_1B, current_1B.to(a_1B.dtype))
            beta = ctx.adjoint(g_1B.squeeze(0), vjp)
        if not isinstance(beta, Tensor):
            ctx.betas[:] = beta
            beta = beta[-1]
        return beta.unsqueeze(0), None, None, None, None, None


def _sum_of_powers(decay: float, steps: int) -> float:
    """sum_{t=1..steps} decay^(steps-t)."""
    return float(steps) if decay == 1 else (1 - decay**steps) / (1 - decay)
