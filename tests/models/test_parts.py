"""The pool that keeps nothing, against torch's."""

import math

import pytest
import torch
from torch import nn

from pipeline.models.convnet import convnet
from pipeline.models.mlp import mlp
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.models.parts import (
    RELU_GAIN,
    SPIKE_GAIN,
    MeanPool,
    Pool,
    spread_by_interpolation,
    spread_by_slices,
)
from pipeline.models.vgg import vgg_sws
from pipeline.spiking.neuron import LIF
from pipeline.spiking.state import fresh_state
from tests.helpers.rule_networks import refusals
from tests.helpers.saved import SavedBytes


def test_gains_restore_unit_variance():
    p = 0.5 * math.erfc(1 / math.sqrt(2))
    assert round(1 / math.sqrt(p * (1 - p)), 2) == SPIKE_GAIN
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (RELU_GAIN * x.relu()).var().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    "build",
    [
        lambda n: vgg_sws(stages=((4,), (4,)), neuron=n),
        lambda n: nf_resnet18_small(width=4, blocks=(1, 1), neuron=n),
        lambda n: mlp(in_features=3 * 8 * 8, neuron=n),
        lambda n: convnet(neuron=n, over="time").eval(),
        lambda n: convnet(neuron=n, over="time", head="rate").eval(),
    ],
)
def test_the_ann_has_the_same_layers(build):
    spiking, ann = build(LIF()), build(nn.ReLU())
    assert {k: v.shape for k, v in spiking.state_dict().items()} == {
        k: v.shape for k, v in ann.state_dict().items()
    }
    x = torch.randn(2, 3, 3, 8, 8)
    with fresh_state(ann):
        together = ann(x)
        assert torch.allclose(together[1], ann(x[1:])[0], atol=1e-6)  # no memory anywhere
    assert sum(isinstance(m, nn.ReLU) for m in ann.modules()) == sum(
        isinstance(m, LIF) for m in spiking.modules()
    )


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


@pytest.mark.parametrize(
    "draw",
    [
        lambda: (4e4 * torch.rand(2, 3, 8, 8)).bfloat16(),
        lambda: (4e4 * torch.rand(2, 3, 8, 8)).half(),
        lambda: (torch.rand(4, 8, 14, 14) > 0.7).float(),
    ],
    ids=["bf16", "fp16", "spikes"],
)
def test_half_precision_rounds_once_and_spikes_are_averaged_exactly(draw):
    x = draw()
    assert torch.equal(MeanPool(2)(x), nn.AvgPool2d(2)(x))


def test_nothing_is_kept_for_the_backward():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with SavedBytes() as saved:
        y = MeanPool(2)(x)
    assert saved.peak == 0
    y.sum().backward()


def test_the_input_is_left_as_it_was():
    x = torch.randn(2, 3, 7, 7)
    before = x.clone()
    MeanPool(1)(x).mul_(2)
    assert torch.equal(x, before)


test_refuses = refusals(
    [
        (lambda: MeanPool(0), r"^MeanPool: size must be a whole number >= 1; got size=0$"),
        (
            lambda: MeanPool(3)(torch.zeros(1, 1, 8, 2)),
            r"^MeanPool: an image must have at least 3 pixels a side; got \(8, 2\)$",
        ),
    ]
)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.MaxPool2d(2),
        nn.MaxPool2d((2, 3), stride=(1, 3), padding=(1, 0)),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d((3, 2), stride=(1, 2), dilation=(2, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("side", [9, 200])
def test_a_max_pool_is_torchs_and_keeps_two_or_four_bytes_an_output(
    side: int, pool: nn.MaxPool2d, order: torch.memory_format
) -> None:
    torch.manual_seed(0)
    numbers_NCHW = torch.randn(6, 2, side, side).round()  # many are equal
    numbers_NCHW[:3] = (numbers_NCHW[:3] > 0).float()  # spikes
    numbers_NCHW[3, :, :4] = -torch.inf
    numbers_NCHW = numbers_NCHW.contiguous(memory_format=order)
    found = []
    for module in (Pool(pool), None):
        x_NCHW = numbers_NCHW.clone(memory_format=torch.preserve_format).requires_grad_()
        with SavedBytes() as saved:
            if module is None:
                y_NCHW = pool(x_NCHW)
            else:
                y_NCHW = module(x_NCHW.unflatten(0, (3, 2))).flatten(0, 1)
        of_an_output = 2 if side == 9 else 4
        if module is not None:
            assert saved.peak == of_an_output * y_NCHW.numel()
        (y_NCHW.nan_to_num() * torch.arange(y_NCHW.numel()).view_as(y_NCHW)).sum().backward()
        found.append((y_NCHW.detach(), x_NCHW.grad))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_max_pool_in_two_threads_passes_on_what_is_not_a_number(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x_TBCHW = torch.randn(2, 16, 4, 32, 32, dtype=dtype)  # enough numbers for two threads
    x_TBCHW[1, -1, 2, 8, 9] = torch.nan
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        y_TBCHW = Pool(pool)(x_TBCHW)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(
        y_TBCHW.nan_to_num(7), pool(x_TBCHW.flatten(0, 1)).view_as(y_TBCHW).nan_to_num(7)
    )
    assert y_TBCHW.isnan().sum() == 2


def test_a_max_pool_refuses_the_padding_that_torch_refuses() -> None:
    with pytest.raises(RuntimeError, match="pad should be at most half"):
        Pool(nn.MaxPool2d(2, padding=2))(torch.zeros(1, 1, 1, 4, 4))
