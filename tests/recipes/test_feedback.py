"""The recipes of IDE and SPIDE that name a published network have its dropout."""

import importlib

import pytest

from pipeline.recipe.recipe import Recipe
from pipeline.spiking.dropout import Dropout


def recipe_of(name: str) -> Recipe:
    return importlib.import_module(f"recipes.{name}").recipe()


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
    assert shares == [share] * synapses
    assert network.dropout.share == 0
