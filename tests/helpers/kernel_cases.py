"""Cases of a neuron's kernel, each held against eager torch."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.spiking.neuron import IF, LIF, PLIF
from pipeline.spiking.state import fresh_state
from pipeline.spiking.surrogate import ATan, Rectangle, Sigmoid, Triangle

SURROGATES = (Triangle(1.0), Triangle(0.7), Sigmoid(4.0), Rectangle(1.0), Rectangle(0.6), ATan(2.0))


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
    decay: float = 0.4

    def build(self, kernel: str) -> LIF:
        about: dict[str, Any] = {
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
    """Every combination of what a kernel branches on; scales and slices in turn."""
    turns = itertools.cycle([(1.0, 1.0, 1), (2.74, 1.25, 2), (2.74, 1.0, 1), (1.0, 1.25, 2)])
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
            neuron, surrogate, reset, gradient, scale, cut, steps, min(slices, steps), gain, beta
        )


def outcome(case: Case, kernel: str, x_TB: Tensor, g_TB: Tensor) -> tuple[Tensor, ...]:
    """Spikes, the last membrane, and the gradients of the input and of a learnt decay."""
    lif = case.build(kernel)
    x_TB = x_TB.detach().clone().requires_grad_()
    with fresh_state(lif):
        slices = x_TB.chunk(case.slices)
        s_TB = torch.cat([lif(x_cB, gain=case.gain, beta=case.beta) for x_cB in slices])
        v_B = lif.state.values["v"]
    gradients = torch.autograd.grad(s_TB, [x_TB, *lif.parameters()], g_TB)
    return s_TB.detach(), v_B.detach(), *gradients


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference as a share of the largest number of `b`."""
    largest = b.double().abs().max().clamp_min(1e-30)
    return float((a.double() - b.double()).abs().max() / largest)
