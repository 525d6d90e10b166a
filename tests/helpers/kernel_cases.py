"""Cases of a neuron's kernel, each held against eager torch."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.spiking.encode import repeat
from pipeline.spiking.neuron import IF, LIF, PLIF
from pipeline.spiking.state import fresh_state
from pipeline.spiking.surrogate import ATan, FastSigmoid, Rectangle, Sigmoid, Triangle

SURROGATES = (
    Triangle(1.0),
    Triangle(0.7),
    Sigmoid(4.0),
    Rectangle(1.0),
    Rectangle(0.6),
    ATan(2.0),
    FastSigmoid(25.0),
)


class Case(NamedTuple):
    """One neuron on one input."""

    neuron: str
    surrogate: Any
    reset: str
    reset_gradient: str
    scale_input: bool
    cut: bool
    steps: int
    slices: int
    gain: float
    beta: float
    comparison: str
    decay: float = 0.4

    def build(self, kernel: str) -> LIF:
        about: dict[str, Any] = {
            "comparison": self.comparison,
            "reset": self.reset,
            "reset_gradient": self.reset_gradient,
            "surrogate": self.surrogate,
            "kernel": kernel,
        }
        if self.neuron == "IF":
            lif = IF(threshold=0.75, **about)
        else:
            cls = PLIF if self.neuron == "PLIF" else LIF
            lif = cls(self.decay, scale_input=self.scale_input, **about)
        if self.cut:
            lif.carry = torch.detach
        return lif


def cases() -> Iterator[Case]:
    """Every combination of what a kernel branches on; scales, slices and comparisons in turn."""
    turns = itertools.cycle([(1.0, 1.0, 1), (2.74, 1.25, 2), (2.74, 1.0, 1), (1.0, 1.25, 2)])
    comparisons = itertools.cycle([">=", ">", ">=", ">", ">"])
    for neuron, surrogate, reset, gradient, scale, cut, steps in itertools.product(
        ("LIF", "IF", "PLIF"),
        SURROGATES,
        ("subtract", "zero"),
        ("detached", "kept"),
        (False, True),
        (False, True),
        (1, 2, 5),
    ):
        if neuron == "IF" and scale:
            continue
        gain, beta, slices = next(turns)
        yield Case(
            *(neuron, surrogate, reset, gradient, scale, cut, steps, min(slices, steps)),
            *(gain, beta, next(comparisons)),
        )


def outcome(case: Case, kernel: str, x_TB: Tensor, g_TB: Tensor) -> tuple[Tensor, ...]:
    """Spikes, the last membrane, and the gradients of the input and of a learnt decay."""
    lif = case.build(kernel).to(x_TB.device)
    x_TB = x_TB.detach().clone().requires_grad_()
    with fresh_state(lif):
        slices = x_TB.chunk(case.slices)
        s_TB = torch.cat([lif(x_cB, gain=case.gain, beta=case.beta) for x_cB in slices])
        v_B = lif.last_membrane(x_TB)
        assert v_B is not None
    gradients = torch.autograd.grad(s_TB, [x_TB, *lif.parameters()], g_TB)
    return s_TB.detach(), v_B.detach(), *gradients


def assert_eagers(
    case: Case, x_TB: Tensor, g_TB: Tensor, bound: float, *, decay_bound: float = 1e-5
) -> None:
    """Spikes and membranes have eager's bits. The gradient of the input differs by at most `bound`
    of its largest number, that of a learnt decay by `decay_bound` of the sum of `g_TB`.
    """
    spikes, v_B, g_x_TB, *g_decay = outcome(case, "auto", x_TB, g_TB)
    eager_spikes, eager_v_B, eager_g_x_TB, *eager_g_decay = outcome(case, "eager", x_TB, g_TB)
    assert torch.equal(spikes, eager_spikes) and torch.equal(v_B, eager_v_B), case
    assert distance(g_x_TB, eager_g_x_TB) <= bound, case
    for one, other in zip(g_decay, eager_g_decay, strict=True):
        assert abs(float(one - other)) <= decay_bound * float(g_TB.float().abs().sum()), case


def ran(x_TB: Tensor, kernel: Any = "auto", lif: LIF | None = None) -> tuple[Tensor, Tensor]:
    """Spikes and the gradient of their sum, weighted by time."""
    lif = LIF(0.4, surrogate=ATan(2.0), kernel=kernel) if lif is None else lif
    x_TB = x_TB.detach().requires_grad_()
    with fresh_state(lif):
        s_TB = lif(x_TB)
    weights_T = torch.arange(1.0, len(x_TB) + 1, device=x_TB.device)
    weights_T = weights_T.view(-1, *[1] * (x_TB.dim() - 1))
    return s_TB.detach(), torch.autograd.grad((s_TB * weights_T).sum(), x_TB)[0]


def _last(x_NC: Tensor) -> Tensor:
    return x_NC.contiguous(memory_format=torch.channels_last)


# Inputs in every order of memory that a kernel takes as it is, or has to copy.
ORDERS = {
    "static": lambda: repeat(torch.randn(4, 3, 6, 6) * 2, 3),
    "channels last": lambda: _last(torch.randn(12, 3, 6, 6) * 2).unflatten(0, (3, 4)),
    "static, channels last": lambda: repeat(_last(torch.randn(4, 3, 6, 6) * 2), 3),
    "batch first": lambda: torch.randn(4, 3, 5).mul_(2).transpose(0, 1),
    "every second": lambda: torch.randn(3, 4, 10).mul_(2)[..., ::2],
    "no neuron": lambda: torch.randn(3, 0, 5),
}


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference as a share of the largest number of `b`."""
    largest = b.double().abs().max().clamp_min(1e-30)
    return float((a.double() - b.double()).abs().max() / largest)
