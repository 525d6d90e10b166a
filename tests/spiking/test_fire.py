"""Spike and reset as one operation, against the expressions that autograd differentiates by itself:
bit by bit.
"""

import pytest
import torch
from torch import Tensor

from pipeline.spiking.neuron import fire
from pipeline.spiking.surrogate import ATan, Rectangle, Sigmoid, Surrogate, Triangle, spike

THRESHOLD = 0.7


def expressions(
    u_B: Tensor, *, subtract: float | None, keeps_gradient: bool, surrogate: Surrogate
) -> tuple[Tensor, Tensor]:
    s_B = spike(u_B - THRESHOLD, surrogate=surrogate)
    s_reset_B = s_B if keeps_gradient else s_B.detach()
    return s_B, (
        u_B * (1 - s_reset_B) if subtract is None else torch.sub(u_B, s_reset_B, alpha=subtract)
    )


@pytest.mark.parametrize("surrogate", [Triangle(), Triangle(2.0), Sigmoid(), Rectangle(), ATan()])
@pytest.mark.parametrize("subtract", [None, THRESHOLD, 1.3])
@pytest.mark.parametrize("keeps_gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_of_either_output_and_both(surrogate, subtract, keeps_gradient, dtype):
    x_B = torch.randn(64, dtype=dtype).add_(THRESHOLD)
    x_B[:2] = torch.tensor([THRESHOLD, 0.0], dtype=dtype)
    x_B.requires_grad_()
    g_s, g_v = torch.randn(2, 64, dtype=dtype)
    about = {"subtract": subtract, "keeps_gradient": keeps_gradient, "surrogate": surrogate}
    for asked in ((0,), (1,), (0, 1)):
        found = []
        for outputs in (fire(x_B * 1, threshold=THRESHOLD, **about), expressions(x_B * 1, **about)):
            wanted, gradients = ([each[index] for index in asked] for each in (outputs, (g_s, g_v)))
            found.append((*outputs, *torch.autograd.grad(wanted, x_B, gradients)))
        assert all(torch.equal(ours, plain) for ours, plain in zip(*found, strict=True))
        s_B = found[0][0]
    assert 0 < s_B.mean() < 1


def test_the_membrane_takes_the_place_of_what_was_given_away():
    u_B = torch.randn(8)
    for subtract in (1.0, None):
        given = u_B.clone()
        _, v_B = fire(
            given, threshold=1.0, subtract=subtract, keeps_gradient=False, surrogate=Triangle()
        )
        assert v_B.data_ptr() == given.data_ptr()


def test_a_second_derivative_is_refused():
    x_B = torch.randn(8, requires_grad=True)
    s_B, _ = fire(x_B * 1, threshold=0.1, subtract=1.0, keeps_gradient=False, surrogate=Sigmoid())
    with pytest.raises(
        RuntimeError, match=r"^fire: a spike has no second derivative; create_graph must be False$"
    ):
        torch.autograd.grad(s_B.sum(), x_B, create_graph=True)
