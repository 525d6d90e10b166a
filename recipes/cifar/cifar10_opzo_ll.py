"""OPZO with a local readout behind each layer on CIFAR-10: four convolutions and a classifier.

Command:  spiketrain write folder --source cifar10 --out data/cifar10 --mode raw
          spiketrain launch recipes/cifar/cifar10_opzo_ll.py --workers 1
Source:   Xiao et al. 2024 (OPZO+LL), arXiv:2407.12516; see cifar10_opzo.py. Readouts over 4 x 4
          places are a choice of ours.
Result:   not run (target, published: 89.42 % top-1; spatial backpropagation 90.00 %)
"""

from dataclasses import replace

from pipeline.models.transforms import with_readouts
from pipeline.recipe import Recipe, spec
from pipeline.rules.opzo import OPZO
from recipes.cifar.cifar10_opzo import recipe as opzo


def recipe() -> Recipe:
    plain = opzo()
    return replace(
        plain,
        name="cifar10-opzo-ll",
        model=spec(with_readouts, network=plain.model, classes=10, cells=4),
        rule=spec(OPZO, local_readouts=True),
    )
