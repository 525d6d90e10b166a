"""What is ours - synapses with their seams, neurons, pools, 1-bit weights - on this machine's device, against float64.

Each is run forward and backward on a tiny input. The reference is written out here, on the CPU and with nothing of ours in it:
a convolution is a product with unfolded patches, and where we replace a derivative its replacement is written down.
"""

# T time, B batch, C channels, O output channels, P what a filter sees, N places

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.doctor.failed import failed
from pipeline.precision import products_in
from pipeline.spiking.binary import Binarization, Binarizer
from pipeline.spiking.neuron import LIF
from pipeline.spiking.pool import MeanPool
from pipeline.spiking.state import fresh_state
from pipeline.spiking.surrogate import ATan, Rectangle, Sigmoid, Surrogate, Triangle
from pipeline.spiking.synapse import Conv2d, Linear

Pairs = Iterator[tuple[Tensor, Tensor]]
"""what our code gave, and what it is to be"""
T, B = 4, 3
PSI: Mapping[Surrogate, Callable[[Tensor], Tensor]] = {
    Triangle(1.0): lambda x: (1 - x.abs()).clamp(min=0),
    Sigmoid(4.0): lambda x: 4 * torch.exp(-4 * x) / (1 + torch.exp(-4 * x)) ** 2,
    Rectangle(1.0): lambda x: (x.abs() <= 0.5).double(),
    ATan(2.0): lambda x: 1 / (1 + (math.pi * x) ** 2),
}
BITS: tuple[Binarization, ...] = ("scaled", "centred", "ir", "learnable")


def differences(device: str) -> dict[str, float | str]:
    """Of each: by how much it is off at most, in parts of the largest number there is; or why it could not be run."""
    checks: dict[str, Callable[[str], Pairs]] = {
        "convolution": _convolution,
        "linear": _linear,
        "neuron": _neuron,
        "pool": _pool,
        "1-bit": _bits,
    }
    found: dict[str, float | str] = {}
    for name, check in checks.items():
        try:
            # A product of TF32 has 10 bits of mantissa, and may be what a recipe wants; here it would hide a mistake.
            with torch.random.fork_rng(devices=[]), products_in("fp32"):
                torch.manual_seed(0)
                found[name] = max(_off(ours, wanted) for ours, wanted in check(device))
        except Exception as error:  # whatever it is, it is what this machine has to tell
            found[name] = failed(error)
    return found


def _off(ours: Tensor, wanted: Tensor) -> float:
    if ours.shape != wanted.shape:
        raise ValueError(f"the shape must be {tuple(wanted.shape)}; got {tuple(ours.shape)}")
    off = ((ours.detach().cpu().double() - wanted).abs().max() / wanted.abs().max()).item()
    return math.inf if math.isnan(off) else off  # max() would pass over it


def _convolution(device: str) -> Pairs:
    conv = Conv2d(3, 4, 3, stride=2, padding=1, weights="standardized")
    yield from _synapse(
        conv, torch.randn(T, B, 3, 6, 6), device, lambda x_TB: F.unfold(x_TB.flatten(0, 1), 3, padding=1, stride=2)
    )


def _linear(device: str) -> Pairs:
    yield from _synapse(
        Linear(5, 4, weights="standardized"), torch.randn(T, B, 5), device, lambda x_TB: x_TB.flatten(0, 1)[..., None]
    )


def _synapse(synapse: Conv2d | Linear, x_TB: Tensor, device: str, seen: Callable[[Tensor], Tensor]) -> Pairs:
    """`seen`: what the filters see, `[T B, P, N]`. Without and with a presynaptic factor x^2 and signs that carry the error."""
    assert synapse.gain is not None and synapse.bias is not None
    with torch.no_grad():
        synapse.gain.uniform_(0.5, 2)
    x, weight, gain, bias = (
        each.detach().double().requires_grad_() for each in (x_TB, synapse.weight, synapse.gain, synapse.bias)
    )
    W_OP = weight.flatten(1)
    mean_O1, var_O1 = W_OP.mean(1, keepdim=True), W_OP.var(1, keepdim=True)
    W_OP = gain.flatten(1) * (W_OP - mean_O1) / (W_OP.shape[1] * var_O1 + 1e-4).sqrt()
    y_ON = W_OP @ seen(x) + bias[:, None]
    g_ON = torch.randn(y_ON.shape)
    synapse.to(device)
    for with_seams in (False, True):
        synapse.presynaptic = torch.square if with_seams else None
        synapse.backward_weight = torch.sign if with_seams else None
        mine = x_TB.detach().to(device).requires_grad_()
        y_TB = synapse(mine)
        inputs = (mine, synapse.weight, synapse.gain, synapse.bias)
        ours = torch.autograd.grad(y_TB, inputs, g_ON.view(y_TB.shape).to(device))
        carried = (W_OP.sign() if with_seams else W_OP).detach() @ seen(x)
        learnt = W_OP @ seen(x.square() if with_seams else x).detach() + bias[:, None]
        wanted = (
            *torch.autograd.grad(carried, x, g_ON.double(), retain_graph=True),
            *torch.autograd.grad(learnt, (weight, gain, bias), g_ON.double(), retain_graph=True),
        )
        yield y_TB, y_ON.detach().view(y_TB.shape)
        yield from zip(ours, wanted, strict=True)


def _neuron(device: str) -> Pairs:
    """On eighths, which float32 holds exactly: whether a neuron spikes hangs on no rounding."""
    x_TB, g_TB = torch.randint(-8, 17, (T, B, 16)) / 8, torch.randn(T, B, 16)
    for (surrogate, psi), to_zero, kept in product(PSI.items(), (False, True), (False, True)):
        reset, gradient = "zero" if to_zero else "subtract", "kept" if kept else "detached"
        lif = LIF(0.5, threshold=1.0, reset=reset, reset_gradient=gradient, surrogate=surrogate)
        wanted = _integrated(x_TB.double(), g_TB.double(), psi, to_zero=to_zero, kept=kept)
        for steps in (T, 1):  # of a slice: a single one goes another way
            mine = x_TB.to(device).requires_grad_()
            with fresh_state(lif):
                s_TB = torch.cat([lif(slice_TB) for slice_TB in mine.split(steps)])
            ours = s_TB, *torch.autograd.grad(s_TB, mine, g_TB.to(device))
            yield from zip(ours, wanted, strict=True)


def _integrated(
    x_TB: Tensor, g_TB: Tensor, psi: Callable[[Tensor], Tensor], *, to_zero: bool, kept: bool
) -> tuple[Tensor, Tensor]:
    """The spikes of leak 0.5 and threshold 1, and the gradient of x, back through all steps."""
    v_B, u, s = torch.zeros_like(x_TB[0]), [], []
    for x_B in x_TB:
        u.append(0.5 * v_B + x_B)
        s.append((u[-1] >= 1).double())
        v_B = u[-1] * (1 - s[-1]) if to_zero else u[-1] - s[-1]
    g_v, g_x = torch.zeros_like(x_TB[0]), []
    for u_B, s_B, g_s in zip(reversed(u), reversed(s), reversed(g_TB), strict=True):
        through_reset = -g_v * (u_B if to_zero else 1) if kept else 0
        g_u = (g_s + through_reset) * psi(u_B - 1) + g_v * ((1 - s_B) if to_zero else 1)
        g_x.append(g_u)
        g_v = 0.5 * g_u
    return torch.stack(s), torch.stack(g_x[::-1])


def _pool(device: str) -> Pairs:
    """Of images that the squares cover, and of one with a row and two columns left over."""
    for size, (height, width) in ((2, (6, 4)), (3, (7, 8))):
        x_NCHW = torch.randn(B, 2, height, width)
        mine, exact = x_NCHW.to(device).requires_grad_(), x_NCHW.double().requires_grad_()
        y_NCHW, wanted = MeanPool(size)(mine), exact.unfold(2, size, size).unfold(3, size, size).mean((4, 5))
        g_NCHW = torch.randn(wanted.shape)
        yield y_NCHW, wanted.detach()
        yield torch.autograd.grad(y_NCHW, mine, g_NCHW.to(device))[0], torch.autograd.grad(wanted, exact, g_NCHW.double())[0]


def _bits(device: str) -> Pairs:
    latent, g_OP = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    for weights in BITS:
        binarizer = Binarizer(latent, weights).to(device)
        mine = latent.to(device).requires_grad_()
        W_b = binarizer(mine)
        ours = torch.autograd.grad(W_b, (mine, *binarizer.parameters()), g_OP.to(device))
        W = latent.double().flatten(1).requires_grad_()
        centred = W - W.mean(1, keepdim=True)
        V = {"centred": centred, "ir": centred / (W.var(1, keepdim=True) + 1e-8).sqrt()}.get(weights, W)
        size_O1 = V.detach().abs().mean(1, keepdim=True)
        a_O1 = {"ir": torch.ones_like(size_O1), "learnable": 2 * size_O1}.get(weights, size_O1)
        window = {"ir": math.inf, "learnable": a_O1}.get(weights, 1.0)
        sign, g = torch.where(V >= 0, 1.0, -1.0).double(), g_OP.double().flatten(1)
        (g_W,) = torch.autograd.grad(V, W, torch.where(V.abs() <= window, g, 0.0))
        wanted = (g_W.view(latent.shape), *([(g * sign).sum(1) / math.sqrt(27)] if weights == "learnable" else []))
        yield W_b, (a_O1 * sign).view(latent.shape)
        yield from zip(ours, wanted, strict=True)
