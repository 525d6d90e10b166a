"""`pipeline.check` on faults and sound networks that were written without a look at it."""

import pytest
import torch

from pipeline.measure.check import check
from tests.helpers.planted_faults import FAULTS, PUBLISHED_QKFORMER, SOUND, drawn, images

SEEDS = (0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 20)))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_at_its_module(fault: str) -> None:
    torch.manual_seed(0)
    planted = FAULTS[fault]
    found = [each for each in check(planted.build(), drawn()) if each.state == "fault"]
    assert planted.module in [each.module for each in found]


def test_the_projection_neuron_of_the_published_qkformer_is_found() -> None:
    torch.manual_seed(0)
    verdicts = check(PUBLISHED_QKFORMER.build(), images())
    [fault] = [each for each in verdicts if each.state == "fault"]
    assert (fault.question, fault.module) == ("batch", PUBLISHED_QKFORMER.module)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SOUND)
def test_a_sound_network_has_no_fault(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    build, draw = SOUND[name]
    assert not [each for each in check(build(), draw()) if each.state == "fault"]
