"""The leaky integrate-and-fire neuron, with a decay that is given (LIF), of 1 (IF), or learnt
(PLIF).
"""

# T time, B batch

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_one_of
from pipeline.spiking.fire import fire
from pipeline.spiking.state import State
from pipeline.spiking.surrogate import Surrogate, Triangle


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
