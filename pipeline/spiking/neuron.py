"""Leaky integrate-and-fire neurons: fixed decay (LIF), decay 1 (IF), learnt decay (PLIF).

Spike and reset are one operation with its own backward, because a network runs them for each neuron
at each time step. Let a = u - threshold. The derivative psi of the surrogate replaces ds/du:

    dL/du = psi(a) G + r dL/dv,   r = 1 (reset "subtract")   or   1 - s (reset "zero")

    reset detached        G = dL/ds
    reset differentiated  G = dL/ds - subtract dL/dv (reset "subtract")
                          G = dL/ds - u dL/dv        (reset "zero")

The backward itself cannot be differentiated.
"""

# T time, B batch

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_one_of, require
from pipeline.spiking.kernels import neuron as fused
from pipeline.spiking.kernels.operators import has_kernels, membrane_dtype
from pipeline.spiking.kernels.packing import mark_spikes
from pipeline.spiking.state import State
from pipeline.spiking.surrogate import Surrogate, Triangle, heaviside

# "auto": the fused kernel of the device, where there is one; "eager": torch.
Kernel = Literal["auto", "eager"]
Comparison = Literal[">=", ">"]


def identity(x: Tensor) -> Tensor:
    return x


class LIF(nn.Module):
    """Leaky integrate-and-fire: maps currents `[T, B, ...]` to spikes `[T, B, ...]`.

        u[t] = decay v[t-1] + x[t],   v[0] = 0
               (scale_input: u[t] = decay v[t-1] + (1 - decay) x[t])
        s[t] = 1 if u[t] >= threshold else 0   (comparison ">": 1 if u[t] > threshold)
        v[t] = u[t] - subtract s[t]   (reset "subtract")   or   u[t] (1 - s[t])   (reset "zero")

    The membrane v has at least fp32 (float64 for a float64 current). Spikes have the dtype of the
    current.

    Args:
        decay: the fraction of the membrane that remains after a time step: 1 - 1/tau with tau in
            steps, snnTorch's beta.
        threshold: in units of the current.
        comparison: ">=", or ">", as in snnTorch and norse.
        reset: "subtract" or "zero", see above.
        subtract: the amount that a spike subtracts from the membrane, in units of the current;
            None: the threshold. With a larger amount the membrane can be negative after a spike.
        reset_gradient: "detached" treats s in the reset as a constant; "kept" differentiates it.
        scale_input: whether the current is multiplied by 1 - decay.
        surrogate: its derivative replaces the derivative of the step function.
        kernel: "auto" runs a slice in one kernel where the device has one, "eager" in torch.

    A rule can set two seams (attributes). `carry(v) -> v` is applied to the membrane after every
    time step. `custom_forward(lif, x_TB) -> s_TB` replaces the whole forward; it can use `step`,
    `membrane` and `state`.

    Raises: ValueError for arguments out of range, outside `fresh_state`, or if the shape of a batch
    changes between slices.

    Source: Wu et al. 2018 (STBP, arXiv 1706.02609), in the form of snnTorch and
    SpikingJelly.
    """

    def __init__(
        self,
        decay: float = 0.5,
        *,
        threshold: float = 1.0,
        comparison: Comparison = ">=",
        reset: Literal["subtract", "zero"] = "subtract",
        subtract: float | None = None,
        reset_gradient: Literal["detached", "kept"] = "detached",
        scale_input: bool = False,
        surrogate: Surrogate = Triangle(),
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        refuse_unless_one_of("LIF", ("auto", "eager"), kernel=kernel)
        require(0 <= decay <= 1, f"LIF: decay must be in 0..1; got decay={decay}")
        require(threshold > 0, f"LIF: threshold must be > 0; got threshold={threshold}")
        refuse_unless_one_of("LIF", (">=", ">"), comparison=comparison)
        refuse_unless_one_of("LIF", ("subtract", "zero"), reset=reset)
        require(
            subtract is None or (reset == "subtract" and subtract > 0),
            f"LIF: subtract must be > 0 and needs reset='subtract'; got subtract={subtract},"
            f" reset={reset!r}",
        )
        refuse_unless_one_of("LIF", ("detached", "kept"), reset_gradient=reset_gradient)
        require(
            not scale_input or decay != 1,
            "LIF: scale_input multiplies the current by 1 - decay, so decay must be < 1; got"
            " decay=1",
        )
        require(
            not isinstance(surrogate, nn.Module)
            and callable(getattr(surrogate, "derivative", None)),
            "LIF: surrogate must have a method derivative, and must not be a torch module; got"
            f" {surrogate}",
        )
        self.decay = decay
        self.threshold = threshold
        self.comparison: Comparison = comparison
        self.reset: Literal["subtract", "zero"] = reset
        self.subtract = threshold if subtract is None else subtract
        self.reset_gradient: Literal["detached", "kept"] = reset_gradient
        self.scale_input = scale_input
        self.surrogate = surrogate
        self.kernel: Kernel = kernel
        self.carry: Callable[[Tensor], Tensor] = identity
        self.custom_forward: Callable[[LIF, Tensor], Tensor] | None = None
        self.state = State("LIF")

    def forward(self, x_TB: Tensor, *, gain: float = 1.0, beta: float = 1.0) -> Tensor:
        """`gain` times the spikes for the current x / beta: networks without norms scale both."""
        surrogate = self._kernel(x_TB)
        if surrogate is None:
            s_TB = self._run(x_TB / beta if beta != 1 else x_TB)
            s_TB = gain * s_TB if gain != 1 else s_TB
            # Other neurons and rules may emit other values.
            is_spiking = self.custom_forward is None and type(self).step is LIF.step
            return mark_spikes(s_TB, gain) if is_spiking else s_TB
        learnt_decay, charge = (
            self.learnt_decay(),
            fused.SCALED if self.scale_input else fused.ADDED,
        )
        if learnt_decay is not None and self.scale_input:
            charge = fused.INTERPOLATED
        s_TB, v_B = fused.run(
            x_TB,
            self._stored(x_TB),
            learnt_decay,
            fused.Constants(
                charge,
                0.0 if learnt_decay is not None else self.decay,
                self.threshold,
                self.margin,
                self.subtract if self.reset == "subtract" else None,
                gain,
                beta,
            ),
            surrogate,
            reset_gradient=self.reset_gradient == "kept",
            cut=self.carry is torch.detach,
        )
        self.state.write("v", v_B)
        return mark_spikes(s_TB, gain)

    def _kernel(self, x_TB: Tensor) -> tuple[int, float, float] | None:
        """The surrogate as the kernels know it; None: eager torch runs this neuron."""
        is_ours = type(self).step is LIF.step and type(self).charge in (LIF.charge, PLIF.charge)
        if (
            self.kernel == "eager"
            or self.custom_forward is not None
            or not is_ours
            or self.carry not in (identity, torch.detach)
            or not has_kernels(x_TB)
        ):
            return None
        return fused.surrogate_constants(self.surrogate)

    def _run(self, x_TB: Tensor) -> Tensor:
        if self.custom_forward is not None:
            return self.custom_forward(self, x_TB)
        v_B = self.membrane(x_TB)
        if len(x_TB) == 1:  # avoids `unbind`, whose backward copies the gradient
            s_TB, v_1B = self.step(x_TB.to(v_B.dtype), v_B.unsqueeze(0))
            self.state.write("v", self.carry(v_1B.squeeze(0)))
            return s_TB.to(x_TB.dtype)
        spikes = []
        for x_B in x_TB.unbind(0):
            s_B, v_B = self.step(x_B.to(v_B.dtype), v_B)
            # At the end of the step, so that under SLTT the stored membrane has no graph.
            v_B = self.carry(v_B)
            spikes.append(s_B.to(x_TB.dtype))
        self.state.write("v", v_B)
        return torch.stack(spikes)

    def membrane(self, x_TB: Tensor) -> Tensor:
        """The membrane v before the first step of the slice `x_TB`; 0 at the start of a batch."""
        v_B = self.last_membrane(x_TB)
        if v_B is None:
            return x_TB.new_zeros(x_TB.shape[1:], dtype=membrane_dtype(x_TB))
        return v_B

    def last_membrane(self, x_TB: Tensor) -> Tensor | None:
        """As `membrane`; None at the start of a batch."""
        v_B = self._stored(x_TB)
        if v_B is None or not fused.is_before_reset(v_B):
            return v_B
        subtract = self.subtract if self.reset == "subtract" else None
        rest_B = torch.zeros_like(v_B) if subtract is None else v_B - subtract
        return torch.where(v_B - self.threshold >= self.margin, rest_B, v_B)

    def _stored(self, x_TB: Tensor) -> Tensor | None:
        """The stored membrane, which may be the one before the reset (`fused.is_before_reset`)."""
        v_B = self.state.read("v")
        if v_B is not None and v_B.shape != x_TB.shape[1:]:
            raise ValueError(
                "LIF: within one fresh_state all time steps must have the same shape; "
                f"got {tuple(x_TB.shape[1:])} after {tuple(v_B.shape)}"
            )
        if v_B is not None and v_B.dtype != membrane_dtype(x_TB):
            raise ValueError(
                "LIF: within one fresh_state all time steps must have the same precision; got"
                f" {x_TB.dtype} after a membrane of {v_B.dtype}"
            )
        return v_B

    @property
    def margin(self) -> float:
        """The neuron fires where u - threshold >= margin.

        For the comparison ">" it is the distance from the threshold to the next number of float64.
        In fp32 and float64, no u - threshold lies between 0 and this distance. (In fp32 it is 0 for
        thresholds below 1e-29.)
        """
        return math.ulp(self.threshold) if self.comparison == ">" else 0.0

    def learnt_decay(self) -> Tensor | None:
        """The decay as a tensor of shape (1,) with a gradient; None: it is a constant."""
        return None

    def step(self, x_B: Tensor, v_B: Tensor) -> tuple[Tensor, Tensor]:
        """One time step, elementwise: (x[t], v[t-1]) -> (s[t], v[t]). All have the same shape."""
        return fire(
            self.charge(x_B, v_B),
            threshold=self.threshold,
            margin=self.margin,
            subtract=self.subtract if self.reset == "subtract" else None,
            has_reset_gradient=self.reset_gradient == "kept",
            surrogate=self.surrogate,
        )

    def charge(self, x_B: Tensor, v_B: Tensor) -> Tensor:
        """Compute u[t] from x[t] and v[t-1], elementwise.

        `fire` may overwrite the result. So the result must be a new tensor and not a view, and the
        backward of `charge` must not need its value.
        """
        current_B = (1 - self.decay) * x_B if self.scale_input else x_B
        return torch.add(current_B, v_B, alpha=self.decay)

    def extra_repr(self) -> str:
        return (
            f"decay={self.decay}, threshold={self.threshold}, comparison={self.comparison!r},"
            f" reset={self.reset!r}, subtract={self.subtract},"
            f" reset_gradient={self.reset_gradient!r}, scale_input={self.scale_input},"
            f" surrogate={self.surrogate}"
        )


class PLIF(LIF):
    """Parametric LIF: the neurons of a layer share one learnt decay, which starts at `decay`.

        decay = sigmoid(w)
        dL/dw = decay (1 - decay) sum g[t] v[t-1],   g[t] = dL/du[t]
                (sum over time steps, samples and neurons;
                scale_input: v[t-1] - x[t] in place of v[t-1])

    Under BPTT g[t] is the full gradient. Under a rule that detaches the membrane between time steps
    (SLTT), g[t] is the gradient within step t. All else is as in LIF. Rules with traces or weighted
    rates refuse PLIF, because they need a constant decay.

    Raises: ValueError unless 0 < decay < 1, and in the cases of LIF.
    Source: Fang et al. 2021 (arXiv 2007.05785), with 1 / tau = 1 - decay and scale_input=True.
    """

    def __init__(
        self,
        decay: float = 0.5,
        *,
        threshold: float = 1.0,
        comparison: Comparison = ">=",
        reset: Literal["subtract", "zero"] = "subtract",
        subtract: float | None = None,
        reset_gradient: Literal["detached", "kept"] = "detached",
        scale_input: bool = False,
        surrogate: Surrogate = Triangle(),
        kernel: Kernel = "auto",
    ) -> None:
        require(
            0 < decay < 1,
            "PLIF: decay must be > 0 and < 1, because it is the value of a sigmoid; got"
            f" decay={decay}",
        )
        super().__init__(
            decay,
            threshold=threshold,
            comparison=comparison,
            reset=reset,
            subtract=subtract,
            reset_gradient=reset_gradient,
            scale_input=scale_input,
            surrogate=surrogate,
            kernel=kernel,
        )
        del self.decay  # the constant of LIF; the decay of PLIF is sigmoid(decay_logit)
        self.decay_logit = nn.Parameter(torch.tensor([math.log(decay / (1 - decay))]))

    def learnt_decay(self) -> Tensor:
        return self.decay_logit.sigmoid()

    def charge(self, x_B: Tensor, v_B: Tensor) -> Tensor:
        decay = self.learnt_decay().to(v_B.dtype)
        return torch.lerp(x_B, v_B, decay) if self.scale_input else torch.addcmul(x_B, v_B, decay)

    def extra_repr(self) -> str:
        return (
            f"decay={self.learnt_decay().item():.4g}, threshold={self.threshold},"
            f" comparison={self.comparison!r}, reset={self.reset!r}, subtract={self.subtract},"
            f" reset_gradient={self.reset_gradient!r}, scale_input={self.scale_input},"
            f" surrogate={self.surrogate}"
        )


def learnt_decays(model: nn.Module) -> list[str]:
    """The module names of all neurons in `model` with a learnt decay."""
    return [
        name or "the model itself"
        for name, module in model.named_modules()
        if isinstance(module, PLIF)
    ]


def IF(
    *,
    threshold: float = 1.0,
    comparison: Comparison = ">=",
    reset: Literal["subtract", "zero"] = "subtract",
    subtract: float | None = None,
    reset_gradient: Literal["detached", "kept"] = "detached",
    surrogate: Surrogate = Triangle(),
    kernel: Kernel = "auto",
) -> LIF:
    """Integrate-and-fire: a LIF neuron without leak (decay 1).

    `threshold` and `subtract` are in units of the current.

    Raises: ValueError in the cases of LIF. Source: that of LIF (arXiv 1706.02609).
    """
    return LIF(
        1.0,
        threshold=threshold,
        comparison=comparison,
        reset=reset,
        subtract=subtract,
        reset_gradient=reset_gradient,
        surrogate=surrogate,
        kernel=kernel,
    )


def named_neurons(model: nn.Module) -> list[tuple[str, LIF]]:
    """The neurons of `model` (`LIF` and subclasses) by module name, in order of registration."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LIF)]


def fire(
    u_B: Tensor,
    *,
    threshold: float,
    margin: float = 0.0,
    subtract: float | None,
    has_reset_gradient: bool,
    surrogate: Surrogate,
) -> tuple[Tensor, Tensor]:
    """Spike and reset: u -> (s, v).

    The function may overwrite `u_B`. So `u_B` must not be a view, and no other code may use `u_B`
    afterwards.

    The backward keeps a = u - threshold. If a reset to zero is differentiated, it also keeps u.

    Args:
        margin: the neuron fires where u - threshold >= margin.
        subtract: the amount that a spike subtracts from the membrane; None: a reset to zero.
        has_reset_gradient: whether the reset is differentiated; if not, its s is a constant.

    Raises: RuntimeError in a backward with `create_graph`.
    """
    return _Fire.apply(  # type: ignore[return-value]  # apply is untyped
        u_B, threshold, margin, subtract, has_reset_gradient, surrogate
    )


class _Fire(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u_B: Tensor,
        threshold: float,
        margin: float,
        subtract: float | None,
        has_reset_gradient: bool,
        surrogate: Surrogate,
    ) -> tuple[Tensor, Tensor]:
        a_B = u_B - threshold
        s_B = heaviside(a_B, margin)
        ctx.margin, ctx.subtract, ctx.surrogate = margin, subtract, surrogate
        ctx.has_reset_gradient = has_reset_gradient
        ctx.set_materialize_grads(False)  # a detached membrane has no gradient
        if subtract is None and has_reset_gradient:
            ctx.save_for_backward(a_B, u_B)
            return s_B, u_B.masked_fill(a_B >= margin, 0)
        ctx.save_for_backward(a_B)
        ctx.mark_dirty(u_B)
        return s_B, (
            u_B.masked_fill_(a_B >= margin, 0)
            if subtract is None
            else u_B.sub_(s_B, alpha=subtract)
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        # torch's `once_differentiable` would return a constant, without an error, if no incoming
        # gradient has a graph.
        if torch.is_grad_enabled():
            raise RuntimeError("fire: a spike has no second derivative; create_graph must be False")
        g_s, g_v = grad_outputs
        a_B, *u = ctx.saved_tensors
        if g_v is not None and ctx.has_reset_gradient:
            reset_g_s = g_v * (u[0] if ctx.subtract is None else ctx.subtract)
            g_s = -reset_g_s if g_s is None else g_s - reset_g_s
        if g_v is not None and ctx.subtract is None:
            g_v = g_v.masked_fill(a_B >= ctx.margin, 0)
        g_u = g_v
        if g_s is not None:
            g_u = ctx.surrogate.derivative(a_B).mul_(g_s)
            if g_v is not None:
                g_u.add_(g_v)
        return g_u, None, None, None, None, None
