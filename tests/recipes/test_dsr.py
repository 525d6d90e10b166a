"""The recipes of DSR with a published target have the published backward and the published
calibration.
"""

import importlib

import pytest

from pipeline.rules.dsr import DSR


def rule_of(name: str) -> DSR:
    rule = importlib.import_module(f"recipes.{name}").recipe().rule.build()
    assert isinstance(rule, DSR)
    return rule


@pytest.mark.parametrize(
    "name",
    [
        "cifar.cifar10_dsr_lif",
        "cifar.cifar10_dsr_lif_t5",
        "cifar.cifar100_dsr_lif",
        "events.cifar10dvs_dsr",
    ],
)
def test_leaky_neurons_have_the_published_backward(name: str) -> None:
    assert rule_of(name).backward == "published"


@pytest.mark.parametrize(
    "name", ["cifar.cifar10_dsr_if", "cifar.cifar100_dsr_if", "imagenet.preact18_dsr"]
)
def test_if_neurons_have_the_one_backward_there_is(name: str) -> None:
    assert rule_of(name).backward == "rates"


def test_the_second_stage_on_imagenet_is_calibrated_on_the_anns_activations() -> None:
    rule = rule_of("imagenet.preact18_dsr")
    assert (rule.calibration_batches, rule.calibrate_on) == (5, "activations")
