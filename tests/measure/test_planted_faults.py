"""`pipeline.check` on faults and sound networks that were written without a look at it."""

import pytest
import snntorch
import torch
from torch import Tensor, nn

from pipeline import wrap
from pipeline.measure.check import check
from pipeline.spiking.neuron import LIF
from pipeline.spiking.synapse import Linear
from tests.helpers.planted_faults import FAULTS, PUBLISHED_QKFORMER, SOUND, drawn, images

SEEDS = (0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 20)))


def small(x: Tensor) -> Tensor:
    """Images of 16 pixels; other inputs as they are."""
    return x[..., :16, :16]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_at_its_module(fault: str) -> None:
    torch.manual_seed(0)
    planted = FAULTS[fault]
    found = [each for each in check(planted.build(), drawn()) if each.state == "fault"]
    assert planted.module in [each.module for each in found]


def test_the_projection_neuron_of_the_published_qkformer_is_found() -> None:
    torch.manual_seed(0)
    verdicts = check(PUBLISHED_QKFORMER.build(), small(images()))
    [fault] = [each for each in verdicts if each.state == "fault"]
    assert (fault.question, fault.module) == ("batch", PUBLISHED_QKFORMER.module)


def test_a_network_of_another_package_must_be_wrapped() -> None:
    network = nn.Sequential(nn.Linear(12, 5), snntorch.Leaky(0.5, init_hidden=True))
    with pytest.raises(ValueError, match=r"got modules of snntorch; pipeline\.wrap"):
        check(network, drawn())
    assert len(check(wrap(network), drawn())) == 7


@pytest.mark.parametrize("lif", [LIF(0.1), LIF(0.5), LIF(0.5, threshold=0.01)], ids=str)
def test_a_few_neurons_are_seen_to_carry_their_membrane(lif: LIF) -> None:
    torch.manual_seed(0)
    found = check(nn.Sequential(Linear(12, 4), lif, Linear(4, 5)), drawn()[:, :2])
    assert [each.state for each in found if each.question == "time"] != ["fault"]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.full] if n == "QKFormer" else []) for n in SOUND]
)
def test_a_sound_network_has_no_fault(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    build, draw = SOUND[name]
    assert not [each for each in check(build(), small(draw())) if each.state == "fault"]
