"""Any network with batch norm by the samples of all workers; that two ranks equal one is in
tests/spiking/test_norm.py.
"""

from collections.abc import Callable

import pytest
from torch import nn

from pipeline.models.convnet import convnet
from pipeline.models.ms_resnet import MSResNet
from pipeline.models.preact_resnet import preact_resnet18_small
from pipeline.models.transforms import synchronized
from pipeline.recipe.recipe import Recipe, spec
from pipeline.spiking.norm import BatchNorm
from tests.helpers.small import small_recipe

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convnet": lambda: convnet(3, in_channels=1, stages=((4,), (4,)), head="rate"),
    "preact": lambda: preact_resnet18_small(3, in_channels=1, width=4, blocks=(1, 1)),
    "ms": lambda: MSResNet(blocks=(1, 1), classes=3, in_channels=1, width=4),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_batch_norm_asks_all_workers_and_no_key_is_another(name: str) -> None:
    network = NETWORKS[name]()
    before = list(network.state_dict())
    assert synchronized(network) is network and list(network.state_dict()) == before
    norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
    assert len(norms) >= 3 and all(norm.between == "world" for norm in norms)


def test_a_recipe_may_say_so_and_is_another_study() -> None:
    network = spec(convnet, classes=10, in_channels=1, stages=((4,),))
    alone, together = (
        small_recipe(model=network),
        small_recipe(model=spec(synchronized, network=network)),
    )
    assert Recipe.from_json(together.to_json()) == together
    assert alone.study_key({}) != together.study_key({})


def test_refuses_a_network_without_batch_norm() -> None:
    with pytest.raises(
        ValueError, match="synchronized: the network must have batch norm; got ConvNet without any"
    ):
        synchronized(convnet(norm="none"))
