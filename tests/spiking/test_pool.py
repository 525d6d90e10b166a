"""The pool that keeps nothing, against torch's."""

import pytest
import torch
from torch import nn

from pipeline.spiking.pool import MeanPool, spread_by_interpolation, spread_by_slices
from tests.helpers.rule_networks import refusals
from tests.helpers.saved import SavedBytes

SHAPES = [(6, 6), (7, 9), (6, 11)]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("pixels", SHAPES)
def test_means_and_their_gradient_are_torchs(size, pixels):
    x = torch.randn(2, 3, *pixels, dtype=torch.float64, requires_grad=True)
    ours, torchs = MeanPool(size)(x), nn.AvgPool2d(size)(x)
    torch.testing.assert_close(ours, torchs, rtol=1e-14, atol=1e-15)
    g = torch.randn_like(ours)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, x, g)[0] for y in (ours, torchs)), rtol=1e-15, atol=0
    )


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("pixels", SHAPES)
def test_a_gpus_backward_is_the_same(size, pixels):
    share = torch.randn(2, 3, *(side // size for side in pixels))
    shape = torch.Size((2, 3, *pixels))
    assert torch.equal(
        spread_by_interpolation(share, shape, size), spread_by_slices(share, shape, size)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once_and_spikes_are_averaged_exactly(dtype):
    for x in ((4e4 * torch.rand(2, 3, 8, 8)).to(dtype), (torch.rand(4, 8, 14, 14) > 0.7).float()):
        assert torch.equal(MeanPool(2)(x), nn.AvgPool2d(2)(x))


def test_nothing_is_kept_for_the_backward():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with SavedBytes() as saved:
        y = MeanPool(2)(x)
    assert saved.peak == 0
    y.sum().backward()


def test_the_input_is_left_as_it_was():
    x = torch.randn(2, 3, 7, 7)
    y = MeanPool(1)(x)
    assert torch.equal(x, y) and x.data_ptr() != y.data_ptr()


test_refuses = refusals(
    [
        (lambda: MeanPool(0), r"^MeanPool: size must be a whole number >= 1; got size=0$"),
        (
            lambda: MeanPool(3)(torch.zeros(1, 1, 8, 2)),
            r"^MeanPool: an image must have 3 pixels a side; got \(8, 2\)$",
        ),
    ]
)
