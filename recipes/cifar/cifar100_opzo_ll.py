"""OPZO with local readouts, and one in the middle whose errors go to all layers below, on
CIFAR-100: nine layers.

Command:  spiketrain write folder --source cifar100 --out data/cifar100 --mode raw
          spiketrain launch recipes/cifar/cifar100_opzo_ll.py --workers 1
Source:   Xiao et al. 2024 (OPZO+LL+IGL, 9 layers), arXiv:2407.12516; its settings and code are not
          public. Network and optimizer are OTTT's for this set; where the readouts stand is a
          choice of ours.
Result:   not run (target, published: 66.13 % top-1; spatial backpropagation 65.96 %)
"""

from dataclasses import replace

from pipeline.models.transforms import with_readouts
from pipeline.recipe import Recipe, spec
from pipeline.rules.opzo import OPZO
from recipes.cifar.base import cifar


def recipe() -> Recipe:
    shared = cifar(100)
    return replace(
        shared,
        name="cifar100-opzo-ll",
        model=spec(with_readouts, network=shared.model, classes=100, cells=4),
        rule=spec(OPZO, local_readouts=True, intermediate=(3,)),
    )
