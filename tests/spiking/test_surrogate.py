import math

import pytest
import torch

from pipeline.spiking.surrogate import (
    ATan,
    FastSigmoid,
    Rectangle,
    Sigmoid,
    SuperSpike,
    Triangle,
    spike,
)
from tests.helpers.rule_networks import refusals

# Each derivative written out with math alone.
CASES = [
    (Triangle(), lambda x: max(0.0, 1 - abs(x))),
    (Triangle(2.0), lambda x: max(0.0, 2 - 4 * abs(x))),
    (Sigmoid(), lambda x: 4 * math.exp(-4 * x) / (1 + math.exp(-4 * x)) ** 2),
    (Sigmoid(1.5), lambda x: 1.5 * math.exp(-1.5 * x) / (1 + math.exp(-1.5 * x)) ** 2),
    (Rectangle(), lambda x: 1.0 if abs(x) <= 0.5 else 0.0),
    (Rectangle(4.0), lambda x: 0.25 if abs(x) <= 2 else 0.0),
    (ATan(), lambda x: 1 / (1 + (math.pi * x) ** 2)),
    (ATan(3.0), lambda x: 1.5 / (1 + (1.5 * math.pi * x) ** 2)),
    (FastSigmoid(), lambda x: 1 / (1 + 25 * abs(x)) ** 2),
    (SuperSpike(), lambda x: 1 / (1 + 100 * abs(x)) ** 2),
    (SuperSpike(1.0), lambda x: 1 / (1 + abs(x)) ** 2),
]
POINTS = [-2.5, -1.0, -0.5, -0.3, -1e-9, 0.0, 0.2, 0.5, 0.7, 2.0, 3.0]


@pytest.mark.parametrize(("surrogate", "psi"), CASES, ids=[repr(s) for s, _ in CASES])
def test_spikes_at_the_threshold_and_differentiates_by_its_formula(surrogate, psi):
    x = torch.tensor(POINTS, dtype=torch.float64, requires_grad=True)
    s = spike(x, surrogate=surrogate)
    assert s.tolist() == [float(p >= 0) for p in POINTS]
    upstream = torch.linspace(-1, 2, len(POINTS), dtype=torch.float64)
    (g,) = torch.autograd.grad(s, x, upstream)
    expected = [u * psi(p) for u, p in zip(upstream.tolist(), POINTS, strict=True)]
    assert g.tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keeps_the_dtype_forward_and_backward(dtype):
    x = torch.randn(5, dtype=dtype, requires_grad=True)
    s = spike(x, surrogate=Sigmoid())
    s.sum().backward()
    assert s.dtype == dtype
    assert x.grad is not None and x.grad.dtype == dtype


def test_a_surrogate_is_a_value():
    assert Sigmoid(4.0) == Sigmoid() != Sigmoid(2.0)


test_refuses_a_window_without_width = refusals(
    (lambda cls=cls: cls(0), rf"{cls.__name__}: {name} must be > 0; got {name}=0")
    for cls, name in (
        (Triangle, "alpha"),
        (Sigmoid, "alpha"),
        (Rectangle, "alpha"),
        (ATan, "alpha"),
        (FastSigmoid, "slope"),
    )
)
