"""Firing by layer and time step, against spikes that were chosen."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.core.random import COUNTED, below, bits
from pipeline.measure.activity import Activity, LayerActivity, firing_rate
from pipeline.spiking.neuron import LIF
from pipeline.spiking.rate import RateIF
from pipeline.spiking.state import fresh_state

# Neuron 0 never fires, neuron 1 always, neuron 2 at the second step of the second sample alone;
# without a decay, so no memory.
SPIKES_TBN = torch.tensor([[[0, 1, 0], [0, 1, 0]], [[0, 1, 0], [0, 1, 1]]]).float()
EXPECTED = LayerActivity(
    name="0", neurons=3, samples=2, rates=(2 / 6, 3 / 6), silent=1 / 3, saturated=1 / 3
)


def run(
    activity: Activity,
    network: nn.Module,
    x_TB: Tensor,
    *,
    slices: int,
    index_B: Tensor | None = None,
) -> None:
    with (
        activity.batch(torch.arange(x_TB.shape[1]) if index_B is None else index_B),
        fresh_state(network),
    ):
        for x_cB in x_TB.split(slices):
            network(x_cB)


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("shape", [(3,), (3, 1, 1)])
def test_rates_silence_and_saturation(
    slices: int, micro_batch: int, shape: tuple[int, ...]
) -> None:
    network = nn.Sequential(LIF(decay=0.0))
    with Activity(network) as activity:
        for x_TB in SPIKES_TBN.unflatten(2, shape).split(micro_batch, dim=1):
            run(activity, network, x_TB, slices=slices)
    assert activity.layers() == (EXPECTED,) and not network[0]._forward_hooks
    assert EXPECTED.rate == pytest.approx(5 / 12)


def test_a_rank_without_samples_and_a_layer_that_nobody_ran() -> None:
    network = nn.Sequential(LIF(decay=0.0), LIF(decay=0.0))
    one, other = Activity(network), Activity(network)
    with one:
        run(one, nn.Sequential(network[0]), SPIKES_TBN, slices=2)
    # A `Reduce` notes what the first rank gives to a collective. The second one's finds it there.
    sums, sizes = list[Tensor](), list[Tensor]()

    def noted(notes: list[Tensor]) -> Callable[[Tensor], Tensor]:
        def reduce(value: Tensor) -> Tensor:
            notes.append(value)
            return value

        return reduce

    alone = one.layers(noted(sums), noted(sizes))
    together = other.layers(
        lambda value: value + sums.pop(0), lambda value: torch.maximum(value, sizes.pop(0))
    )
    assert together == alone == (EXPECTED,)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("kind", ["ones", "heights"])
def test_of_one_in_so_many_samples(shuffled: bool, kind: str) -> None:
    """The same whatever the batches and their order: those whose id has drawn it."""
    draw = torch.Generator().manual_seed(0)
    x_TIN = 2 * torch.rand(3, 40, 50, generator=draw)
    index_B = 100 + (torch.randperm(40, generator=draw) if shuffled else torch.arange(40))
    network = nn.Sequential(RateIF(threshold=0.7) if kind == "heights" else LIF())
    with Activity(network, every=7) as activity:
        for here_B in index_B.split(6):
            run(activity, network, x_TIN[:, here_B - 100], slices=2, index_B=here_B)
    drawn_I = torch.from_numpy(below(bits(0, 0, np.arange(100, 140), COUNTED), 7) == 0)
    assert 2 < drawn_I.sum() < 12  # and in some batches none
    with Activity(network) as alone:
        run(alone, network, x_TIN[:, drawn_I], slices=3)
    (layer,) = activity.layers()
    assert layer == alone.layers()[0]
    assert layer.samples == drawn_I.sum() and 0 < layer.rate < 1


@pytest.mark.parametrize("classes", [2, 7, 8, 10, 91, 100, 144])
def test_no_class_is_left_out_where_classes_take_turns(classes: int) -> None:
    """As every seventh sample, or every eighth, leaves out some."""
    places_C = torch.tensor(Activity(nn.Sequential(LIF()), every=8).counted_rows(np.arange(10_000)))
    counts = torch.bincount(places_C % classes, minlength=classes)
    fair = 10_000 / 8 / classes
    assert (counts - fair).abs().max() < 4 * fair**0.5 and counts.min() > 0


def test_of_no_sample_nothing_is_known() -> None:
    network = nn.Sequential(LIF())
    undrawn = next(
        place for place in range(100) if below(bits(0, 0, [place, place + 1], COUNTED), 7).all()
    )
    with Activity(network, every=7) as activity:
        run(activity, network, SPIKES_TBN, slices=2, index_B=torch.tensor([undrawn, undrawn + 1]))
    assert activity.layers() == ()
    assert math.isnan(firing_rate(()))


def halves(neuron: LIF, x_TB: Tensor) -> Tensor:
    """A rule's gradient, whose spikes are worth a half."""
    return (x_TB >= 1).to(x_TB.dtype) / 2


@pytest.mark.parametrize("kind", ["ones", "heights", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spikes_count_as_one_whatever_they_are_worth(kind: str, dtype: torch.dtype) -> None:
    """Of 514 samples, or half as many: two numbers that bfloat16 has not."""
    neuron = RateIF(threshold=0.7) if kind == "heights" else LIF(decay=0.0)
    neuron.custom_forward = halves if kind == "gradient" else None
    x_TBN = SPIKES_TBN.repeat(1, 257, 1).to(dtype)
    with (
        Activity(neuron) as activity,
        torch.no_grad(),
        activity.batch(torch.arange(514)),
        fresh_state(neuron),
    ):
        fired_TBN = neuron(x_TBN) != 0
    (layer,) = activity.layers()
    assert layer.rates == tuple(fired_TBN.double().mean((1, 2)).tolist()) == (2 / 6, 3 / 6)
    assert (layer.silent, layer.saturated) == (1 / 3, 1 / 3)


class Passes(TorchDispatchMode):
    """Which operations read or write so many numbers; a view does neither."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.names = numbers, list[str]()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and any(
            isinstance(each, Tensor) and each.numel() == self.numbers for each in (*args, result)
        ):
            self.names.append(func.overloadpacket.__name__)
        return result


@pytest.mark.parametrize(
    ("neuron", "expected"),
    [(LIF(), ["_embedding_bag_forward_only"]), (RateIF(), ["index", "ne", "sum"])],
)
def test_ones_are_passed_over_once_and_no_device_is_waited_for(
    neuron: LIF, expected: list[str]
) -> None:
    """Each evaluation pays for it (benchmarks/measuring.py). From a meta tensor no number can be
    had.
    """
    activity, s_TB = Activity(neuron), torch.empty(2, 100, 21, device="meta")
    (layer,) = activity._layers
    for _ in range(2):
        with Passes(s_TB.numel()) as passes, activity.batch(torch.arange(100)):
            layer.record(neuron, None, {}, s_TB)
        assert passes.names == expected
    assert (layer.by_step_T.shape, layer.by_neuron_N.shape) == ((2,), (21,))
