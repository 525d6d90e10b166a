"""Recipes that name a published setting hold it."""

import importlib

import pytest

from pipeline.recipe.recipe import Recipe
from pipeline.rules.dsr import DSR
from pipeline.rules.hlop import HLOP
from pipeline.spiking.dropout import Dropout


def recipe_of(name: str) -> Recipe:
    return importlib.import_module(f"recipes.{name}").recipe()


def published_rows(tasks: int) -> list[tuple[int, ...]]:
    """What the published scripts for permuted MNIST add in each task, written out as they compute
    it.
    """
    first, more = [80, 200, 100], [70, 70, 70]
    rows = [tuple(first)]
    for task in range(1, tasks):
        if task % 3 == 0:
            more = [each - 20 for each in more]
        rows.append(tuple(more))
    return rows


@pytest.mark.parametrize("inner", ["bptt", "dsr", "ottt", "sltt"])
def test_ten_permutations_add_the_published_rows(inner: str) -> None:
    recipe = recipe_of(f"continual.permuted_fashion_hlop_{inner}")
    rule = recipe.rule.build()
    assert isinstance(rule, HLOP)
    rows = [rule.rows[min(task, len(rule.rows) - 1)] for task in range(len(recipe.phases))]
    assert rows == published_rows(10) and sum(second for _, second, _ in rows[:-1]) == 580


@pytest.mark.parametrize(
    ("name", "backward"),
    [
        ("cifar.cifar10_dsr_lif", "published"),
        ("cifar.cifar10_dsr_lif_t5", "published"),
        ("cifar.cifar100_dsr_lif", "published"),
        ("events.cifar10dvs_dsr", "published"),
        # of IF neurons, which have one backward
        ("cifar.cifar10_dsr_if", "rates"),
        ("cifar.cifar100_dsr_if", "rates"),
        ("imagenet.preact18_dsr", "rates"),
    ],
)
def test_neurons_of_dsr_have_the_published_backward(name: str, backward: str) -> None:
    rule = recipe_of(name).rule.build()
    assert isinstance(rule, DSR) and rule.backward == backward


def test_the_second_stage_on_imagenet_is_calibrated_on_the_anns_activations() -> None:
    rule = recipe_of("imagenet.preact18_dsr").rule.build()
    assert (rule.calibration_batches, rule.calibrate_on) == (5, "activations")


@pytest.mark.parametrize(
    ("name", "share", "synapses"),
    [
        ("cifar.cifar10_alexnet_f_ide", 0.2, 6),
        ("cifar.cifar10_cifarnet_f_ide", 0.2, 6),
        ("cifar.cifar100_cifarnet_f_ide", 0.2, 6),
        ("cifar.cifar10_alexnet_f_spide", 0.2, 6),
        ("cifar.cifar10_cifarnet_f_spide", 0.25, 6),
        ("cifar.cifar100_cifarnet_f_spide", 0.25, 6),
        ("events.nmnist_ide", 0.2, 2),
        ("events.cifar10dvs_spide", 0.0, 0),
    ],
)
def test_dropout_stands_on_the_currents_and_not_on_the_readout(
    name: str, share: float, synapses: int
) -> None:
    network = recipe_of(name).model.build()
    shares = [each.share for each in network.equilibrium.modules() if isinstance(each, Dropout)]
    assert shares == [share] * synapses and network.dropout.share == 0
