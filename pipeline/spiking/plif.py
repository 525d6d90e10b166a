"""The neuron that learns how much of its membrane it keeps."""

# T time, B batch

import math
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.spiking.neuron import LIF
from pipeline.spiking.surrogate import Surrogate, Triangle


class PLIF(LIF):
    """Parametric LIF: `leak` is where it begins, and a layer's neurons share one that is learnt.

        leak = sigmoid(w),      dL/dw = leak (1 - leak) sum_t g[t] v[t-1]          (decay_input: v[t-1] - x[t])

    with g[t] = dL/du[t] whole under BPTT, and of the time step alone under a rule that cuts the membrane's graph (SLTT). All
    else is `LIF`'s, the seams too. Rules whose traces or rates take the leak for a constant refuse it.

    Raises: ValueError for a leak that no w gives, and what LIF refuses.
    Source: Fang et al. 2021 (arXiv 2007.05785), whose 1 / tau is 1 - leak, with decay_input.
    """

    def __init__(
        self,
        leak: float = 0.5,
        *,
        threshold: float = 1.0,
        reset: Literal["subtract", "zero"] = "subtract",
        subtract: float | None = None,
        reset_gradient: Literal["detached", "kept"] = "detached",
        decay_input: bool = False,
        surrogate: Surrogate = Triangle(),
    ) -> None:
        if not 0 < leak < 1:
            raise ValueError(f"PLIF: leak must be in 0..1, both excluded, for a sigmoid reaches neither; got leak={leak}")
        super().__init__(
            leak,
            threshold=threshold,
            reset=reset,
            subtract=subtract,
            reset_gradient=reset_gradient,
            decay_input=decay_input,
            surrogate=surrogate,
        )
        del self.leak  # a number, which it is no more
        self.leak_logit = nn.Parameter(torch.tensor([math.log(leak / (1 - leak))]))

    def charged(self, x_B: Tensor, v_B: Tensor) -> Tensor:
        leak = self.leak_logit.sigmoid().to(v_B.dtype)
        return torch.lerp(x_B, v_B, leak) if self.decay_input else torch.addcmul(x_B, v_B, leak)

    def extra_repr(self) -> str:
        return (
            f"leak={self.leak_logit.sigmoid().item():.4g}, threshold={self.threshold}, reset={self.reset!r}, "
            f"subtract={self.subtract}, reset_gradient={self.reset_gradient!r}, decay_input={self.decay_input}, "
            f"surrogate={self.surrogate}"
        )


def learnt_leaks(model: nn.Module) -> list[str]:
    """The neurons of `model` whose leak is learnt, by module name."""
    return [name or "the model itself" for name, module in model.named_modules() if isinstance(module, PLIF)]
