"""What an inference is counted on, and when top-5 is measured; the figures of an evaluation are in
test_ranks.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.measure.operations import Operations
from pipeline.spiking.neuron import LIF
from pipeline.spiking.state import fresh_state
from pipeline.spiking.synapse import Linear
from pipeline.train.evaluation import COUNTED, Evaluated, evaluate
from pipeline.train.objective import CrossEntropy

T, B, I, K = 3, 192, 4, 7


def sorted_set() -> Tensor:
    """As a file that is sorted by class: the first half is silence, the second is loud."""
    x_TBI = torch.rand(T, B, I, generator=torch.Generator().manual_seed(0)) + 1
    x_TBI[:, : B // 2] = 0
    return x_TBI


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Linear(I, 6, bias=False), LIF(), Linear(6, K))


@pytest.mark.parametrize(("classes", "measured"), [(2, False), (5, False), (6, True)])
def test_top_5_is_measured_of_six_classes_or_more(classes: int, measured: bool) -> None:
    model, x_TBI = nn.Sequential(Linear(I, classes)), torch.rand(T, 12, I)
    target_B = torch.arange(12) % classes
    result = evaluate(model, [(x_TBI, target_B, torch.arange(12))], CrossEntropy()).result
    assert (result.top5 is not None) == measured
    assert list(result.metrics) == ["top1", *["top5"] * measured, "loss", "firing_rate"]
    if measured:
        fifth_B = model(x_TBI).mean(0).topk(5).indices
        assert result.top5 == pytest.approx(
            float((fifth_B == target_B[:, None]).any(-1).double().mean())
        )


def evaluated(*, counts: bool) -> Evaluated:
    target_B = torch.arange(B) % K
    batches = list(
        zip(
            sorted_set().split(16, dim=1),
            target_B.split(16),
            torch.arange(B).split(16),
            strict=True,
        )
    )
    return evaluate(network(), batches, CrossEntropy(), counts_operations=counts)


def test_operations_are_of_samples_from_all_over_the_set() -> None:
    inference = evaluated(counts=True).inference
    assert inference is not None and inference.samples == COUNTED < B // 2
    loud = inference.macs * COUNTED / (T * I * 6)  # of a product with silence nothing is made
    assert loud == int(loud) and COUNTED / 3 < loud < COUNTED * 2 / 3


def test_of_a_set_that_is_no_larger_each_sample_is_counted() -> None:
    model, few = network().eval(), sorted_set()[:, B // 2 - 12 : B // 2 + 12]
    with torch.no_grad(), Operations(model) as counted, fresh_state(model):
        model(few)
    whole = counted.work["forward"]
    inference = evaluate(
        model,
        [(few, torch.arange(24) % K, torch.arange(24))],
        CrossEntropy(),
        counts_operations=True,
    ).inference
    assert inference is not None and inference.samples == 24
    assert inference.macs * 24 == whole.multiplications == T * 12 * I * 6
    assert inference.work.additions == whole.additions > whole.multiplications


def test_counting_adds_nothing_to_what_is_evaluated() -> None:
    plain, counted = evaluated(counts=False), evaluated(counts=True)
    assert (
        plain.inference is None
        and plain.result == counted.result
        and plain.activity == counted.activity
    )
