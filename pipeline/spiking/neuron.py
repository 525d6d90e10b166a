"""The leaky integrate-and-fire neuron, with a decay that is given (LIF), of 1 (IF), or learnt
(PLIF).

A membrane at its threshold: the spike, and the reset after it, as one operation with a backward
of its own.

    s = 1 if u >= threshold else 0
    v = u - subtract s      (reset by subtraction)      or      u (1 - s)      (reset to zero)

With a = u - threshold, and psi the derivative that a surrogate puts in the place of ds/du:

    dL/du = psi(a) dL/ds + dL/dv r,      r = 1      or      1 - s

and where the reset is differentiated, too, dL/ds is less by subtract dL/dv, or by u dL/dv. A
network asks for this once for each neuron and time step, and autograd would note every kernel of
it. The backward is not differentiable itself, and refuses to be.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_one_of
from pipeline.spiking.state import State
from pipeline.spiking.surrogate import Surrogate, Triangle, heaviside

# T time, B batch


def identity(v_B: Tensor) -> Tensor:
    """`LIF.carry` of a plain model: the membrane crosses the time step with its graph (BPTT). Also
    `World.mean` of one rank.
    """
    return v_B


class LIF(nn.Module):
    """Leaky integrate-and-fire: currents `[T, B, ...]` to spikes `[T, B, ...]`.

        u[t] = decay v[t-1] + x[t]              (scale_input: decay v[t-1] + (1 - decay) x[t]),
        v[0] =
        0
        s[t] = 1 if u[t] >= threshold else 0
        v[t] = u[t] - subtract s[t]            (reset "subtract")      or      u[t] (1 - s[t])
        (reset "zero")

    Arguments: `decay` is the part of the membrane kept per time step, 1 - 1/tau with tau in steps
    (`PLIF` learns it); `threshold` is in units of the current, and so is `subtract`, None for the
    threshold (more of it makes rest negative); `reset_gradient="detached"` treats the s of the last
    line as a constant; `surrogate` replaces the derivative of the second line. The membrane is
    never below fp32 (float64 stays); spikes have the dtype of the current.

    Two seams for rules: `carry` is applied to the membrane after every step, so it stands between
    all steps, inside a slice as between slices; `gradient(lif, x_TB) -> s_TB`, where set, replaces
    the loop (it finds the equations in `step` and the membrane in `membrane` and `state`).

    Raises: ValueError for arguments out of range, outside `fresh_state`, or when a batch changes
    its shape half-way."""

    def __init__(
        self,
        decay: float = 0.5,
        *,
        threshold: float = 1.0,
        reset: Literal["subtract", "zero"] = "subtract",
        subtract: float | None = None,
        reset_gradient: Literal["detached", "kept"] = "detached",
        scale_input: bool = False,
        surrogate: Surrogate = Triangle(),
    ) -> None:
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"LIF: decay must be in 0..1; got decay={decay}")
        if not threshold > 0:
            raise ValueError(f"LIF: threshold must be > 0; got threshold={threshold}")
        refuse_unless_one_of("LIF", ("subtract", "zero"), reset=reset)
        if subtract is not None and (reset != "subtract" or not subtract > 0):
            raise ValueError(
                f"LIF: subtract must be > 0 and needs reset='subtract'; got subtract={subtract},"
                f" reset={reset!r}"
            )
        refuse_unless_one_of("LIF", ("detached", "kept"), reset_gradient=reset_gradient)
        if scale_input and decay == 1:
            raise ValueError(
                "LIF: scale_input scales the current by 1 - decay, so decay must be < 1; got"
                " decay=1"
            )
        if isinstance(surrogate, nn.Module) or not callable(getattr(surrogate, "derivative", None)):
            raise ValueError(
                "LIF: surrogate must be a value with a derivative, of which nothing is learnt; got"
                f" {surrogate}"
            )
        self.decay = decay
        self.threshold = threshold
        self.reset = reset
        self.subtract = threshold if subtract is None else subtract
        self.reset_gradient = reset_gradient
        self.scale_input = scale_input
        self.surrogate = surrogate
        self.carry: Callable[[Tensor], Tensor] = identity
        self.gradient: Callable[[LIF, Tensor], Tensor] | None = None
        self.state = State("LIF")

    def forward(self, x_TB: Tensor) -> Tensor:
        if self.gradient is not None:
            return self.gradient(self, x_TB)
        v_B = self.membrane(x_TB)
        if len(x_TB) == 1:  # as it is: what goes back through `unbind` is copied
            s_TB, v_1B = self.step(x_TB.to(v_B.dtype), v_B.unsqueeze(0))
            self.state.write("v", self.carry(v_1B.squeeze(0)))
            return s_TB.to(x_TB.dtype)
        spikes = []
        for x_B in x_TB.unbind(0):
            s_B, v_B = self.step(x_B.to(v_B.dtype), v_B)
            # Applied when a step ends, not when the next begins: what is remembered then holds no
            # graph under SLTT.
            v_B = self.carry(v_B)
            spikes.append(s_B.to(x_TB.dtype))
        self.state.write("v", v_B)
        return torch.stack(spikes)

    def membrane(self, x_TB: Tensor) -> Tensor:
        """v before the first step of the slice `x_TB`: the last slice's, or rest."""
        v_B = self.state.read("v")
        if v_B is None:
            return x_TB.new_zeros(
                x_TB.shape[1:], dtype=torch.promote_types(x_TB.dtype, torch.float32)
            )
        if v_B.shape != x_TB.shape[1:]:
            raise ValueError(
                "LIF: the slices of one fresh_state must agree in all but time; "
                f"got {tuple(x_TB.shape[1:])} after {tuple(v_B.shape)}"
            )
        return v_B

    def step(self, x_B: Tensor, v_B: Tensor) -> tuple[Tensor, Tensor]:
        """One time step of the equations above: (x[t], v[t-1]) -> (s[t], v[t]), element by element.

        Both `[B, ...]`, or `[1, B, ...]` where a slice has one step.
        """
        return fire(
            self.charged(x_B, v_B),
            threshold=self.threshold,
            subtract=self.subtract if self.reset == "subtract" else None,
            keeps_gradient=self.reset_gradient == "kept",
            surrogate=self.surrogate,
        )

    def charged(self, x_B: Tensor, v_B: Tensor) -> Tensor:
        """u[t] of x[t] and v[t-1], element by element.

        In memory of its own, which `fire` writes to: neither a view nor what the backward of its
        own last operation keeps."""
        current_B = (1 - self.decay) * x_B if self.scale_input else x_B
        return torch.add(current_B, v_B, alpha=self.decay)

    def extra_repr(self) -> str:
        return (
            f"decay={self.decay}, threshold={self.threshold}, reset={self.reset!r},"
            f" subtract={self.subtract}, reset_gradient={self.reset_gradient!r},"
            f" scale_input={self.scale_input}, surrogate={self.surrogate}"
        )


class PLIF(LIF):
    """Parametric LIF: `decay` is where it begins, and a layer's neurons share one that is learnt.

        decay = sigmoid(w),      dL/dw = decay (1 - decay) sum_t g[t] v[t-1]          (scale_input:
        v[t-1] - x[t])

    with g[t] = dL/du[t] whole under BPTT, and of the time step alone under a rule that cuts the
    membrane's graph (SLTT). All else is `LIF`'s, the seams too. Rules whose traces or rates take
    the decay for a constant refuse it.

    Raises: ValueError for a decay that no w gives, and what LIF refuses.
    Source: Fang et al. 2021 (arXiv 2007.05785), whose 1 / tau is 1 - decay, with scale_input.
    """

    def __init__(
        self,
        decay: float = 0.5,
        *,
        threshold: float = 1.0,
        reset: Literal["subtract", "zero"] = "subtract",
        subtract: float | None = None,
        reset_gradient: Literal["detached", "kept"] = "detached",
        scale_input: bool = False,
        surrogate: Surrogate = Triangle(),
    ) -> None:
        if not 0 < decay < 1:
            raise ValueError(
                "PLIF: decay must be in 0..1, both excluded, for a sigmoid reaches neither; got"
                f" decay={decay}"
            )
        super().__init__(
            decay,
            threshold=threshold,
            reset=reset,
            subtract=subtract,
            reset_gradient=reset_gradient,
            scale_input=scale_input,
            surrogate=surrogate,
        )
        del self.decay  # a number, which it is no more
        self.decay_logit = nn.Parameter(torch.tensor([math.log(decay / (1 - decay))]))

    def charged(self, x_B: Tensor, v_B: Tensor) -> Tensor:
        decay = self.decay_logit.sigmoid().to(v_B.dtype)
        return torch.lerp(x_B, v_B, decay) if self.scale_input else torch.addcmul(x_B, v_B, decay)

    def extra_repr(self) -> str:
        return (
            f"decay={self.decay_logit.sigmoid().item():.4g}, threshold={self.threshold},"
            f" reset={self.reset!r}, subtract={self.subtract},"
            f" reset_gradient={self.reset_gradient!r}, scale_input={self.scale_input},"
            f" surrogate={self.surrogate}"
        )


def learnt_decays(model: nn.Module) -> list[str]:
    """The neurons of `model` whose decay is learnt, by module name."""
    return [
        name or "the model itself"
        for name, module in model.named_modules()
        if isinstance(module, PLIF)
    ]


def IF(
    *,
    threshold: float = 1.0,
    reset: Literal["subtract", "zero"] = "subtract",
    subtract: float | None = None,
    reset_gradient: Literal["detached", "kept"] = "detached",
    surrogate: Surrogate = Triangle(),
) -> LIF:
    """Integrate-and-fire: the LIF that forgets nothing, decay 1."""
    return LIF(
        1.0,
        threshold=threshold,
        reset=reset,
        subtract=subtract,
        reset_gradient=reset_gradient,
        surrogate=surrogate,
    )


def named_neurons(model: nn.Module) -> list[tuple[str, LIF]]:
    """Every LIF of `model` with its module name, in the order of construction."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LIF)]


# B batch


def fire(
    u_B: Tensor,
    *,
    threshold: float,
    subtract: float | None,
    keeps_gradient: bool,
    surrogate: Surrogate,
) -> tuple[Tensor, Tensor]:
    """u -> (s, v). The caller gives u away, whose memory may become v's: no view, and not what its
    own backward needs.

    CachedPredictions for the backward is a alone, and u where a reset to zero is differentiated.

    Args:
        subtract: what a spike takes from the membrane; None: all of it.
        keeps_gradient: whether the reset is differentiated, or its s a constant.

    Raises: RuntimeError in a backward that is to be differentiated (`create_graph`).
    """
    # apply is untyped
    return _Fire.apply(u_B, threshold, subtract, keeps_gradient, surrogate)  # type: ignore[return-value]


class _Fire(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u_B: Tensor,
        threshold: float,
        subtract: float | None,
        keeps_gradient: bool,
        surrogate: Surrogate,
    ) -> tuple[Tensor, Tensor]:
        a_B = u_B - threshold
        s_B = heaviside(a_B)
        ctx.subtract, ctx.keeps_gradient, ctx.surrogate = subtract, keeps_gradient, surrogate
        ctx.set_materialize_grads(False)  # of a membrane that is cut there is none
        if subtract is None and keeps_gradient:
            ctx.save_for_backward(a_B, u_B)
            return s_B, u_B.masked_fill(a_B >= 0, 0)
        ctx.save_for_backward(a_B)
        ctx.mark_dirty(u_B)
        return s_B, (
            u_B.masked_fill_(a_B >= 0, 0) if subtract is None else u_B.sub_(s_B, alpha=subtract)
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        # torch's own `once_differentiable` gives a constant where no gradient comes in with a graph
        if torch.is_grad_enabled():
            raise RuntimeError("fire: a spike has no second derivative; create_graph must be False")
        g_s, g_v = grad_outputs
        a_B, *u = ctx.saved_tensors
        if g_v is not None and ctx.keeps_gradient:
            taken = g_v * (u[0] if ctx.subtract is None else ctx.subtract)
            g_s = -taken if g_s is None else g_s - taken
        if g_v is not None and ctx.subtract is None:
            g_v = g_v.masked_fill(a_B >= 0, 0)
        g_u = g_v
        if g_s is not None:
            g_u = ctx.surrogate.derivative(a_B).mul_(g_s)
            if g_v is not None:
                g_u.add_(g_v)
        return g_u, None, None, None, None
