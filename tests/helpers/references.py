"""Gradients of `lif_network` at decay 0.5 with a soft reset, without the pipeline's layers."""

# T time, B batch, C channels, K classes

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Factors = dict[str, tuple[Tensor, Tensor, Tensor]]


def triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def sigmoid_window(x: Tensor) -> Tensor:
    return 4 * torch.sigmoid(4 * x) * (1 - torch.sigmoid(4 * x))


class Spike(torch.autograd.Function):
    """A spike with the triangle as its derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x >= 0).double()

    @staticmethod
    def backward(ctx, *grad_outputs):
        return grad_outputs[0] * triangle(ctx.saved_tensors[0])


def by_autograd(
    model: nn.Sequential,
    x_TBC: Tensor,
    target_B: Tensor,
    *,
    keep_reset: bool = False,
    over_time: str = "steps",
    cut: int | None = None,
) -> dict[str, Tensor]:
    """BPTT in a plain loop. `cut`: the membranes lose their graph every so many steps."""
    w1, b1, w2, b2, w3, b3 = model.parameters()
    v1 = v2 = torch.zeros((), dtype=torch.float64)
    logits = []
    for t, x in enumerate(x_TBC):
        if cut is not None and t % cut == 0:
            v1, v2 = v1.detach(), v2.detach()
        u1 = 0.5 * v1 + x @ w1.T + b1
        s1 = Spike.apply(u1 - 1)
        u2 = 0.5 * v2 + s1 @ w2.T + b2
        s2 = Spike.apply(u2 - 1)
        v1, v2 = (u - (s if keep_reset else s.detach()) for u, s in ((u1, s1), (u2, s2)))
        logits.append(s2 @ w3.T + b3)
    if over_time == "mean":
        logits = [torch.stack(logits).mean(0)]
    loss = torch.stack([F.cross_entropy(o, target_B) for o in logits]).mean()
    return gradient_of(loss, model)


def gradient_of(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@torch.no_grad()
def three_factors(
    model: nn.Sequential,
    x_TBC: Tensor,
    target_B: Tensor,
    *,
    decay: float = 0.5,
    window: Callable[[Tensor], Tensor] = triangle,
    carriers: tuple[Tensor, Tensor] | None = None,
) -> Factors:
    """For each layer and every step its input, its surrogate and the error from above.

    `carriers` carry the errors down in the place of the second and third weight. There is no
    autograd.
    """
    w1, b1, w2, b2, w3, b3 = model.parameters()
    down2, down3 = carriers or (w2, w3)
    v1, v2 = (torch.zeros(x_TBC.shape[1], len(w), dtype=torch.float64) for w in (w1, w2))
    log = []
    for x in x_TBC:
        u1 = decay * v1 + x @ w1.T + b1
        s1 = (u1 >= 1).double()
        u2 = decay * v2 + s1 @ w2.T + b2
        s2 = (u2 >= 1).double()
        v1, v2 = u1 - s1, u2 - s2
        e3 = torch.softmax(s2 @ w3.T + b3, 1) - F.one_hot(target_B, len(w3))
        e3 = e3 / len(x) / len(x_TBC)
        psi1, psi2 = window(u1 - 1), window(u2 - 1)
        e2 = e3 @ down3
        e1 = (e2 * psi2) @ down2
        log.append((x, psi1, e1, s1, psi2, e2, s2, torch.ones_like(e3), e3))
    each = [torch.stack(values) for values in zip(*log, strict=True)]
    by_layer: Any = {"0": tuple(each[:3]), "2": tuple(each[3:6]), "4": tuple(each[6:])}
    return by_layer


def summed(factors: Factors) -> dict[str, Tensor]:
    """SLTT's gradient: the products of one time step, summed over time."""
    found = {}
    for layer, (x_TBC, psi_TBN, e_TBN) in factors.items():
        found[f"{layer}.weight"] = torch.einsum("tbo,tbi->oi", e_TBN * psi_TBN, x_TBC)
        found[f"{layer}.bias"] = (e_TBN * psi_TBN).sum((0, 1))
    return found
