"""OPZO on CIFAR-10: four convolutions and a classifier.

Command:  spiketrain write folder --source cifar10 --out data/cifar10 --mode raw
          spiketrain launch recipes/cifar/cifar10_opzo.py --workers 1
Source:   Xiao et al. 2024 (OPZO, 5 convolutional layers), arXiv:2407.12516; its settings and code
          are not public. Widths are a choice of ours, the rest are OTTT's settings for this set.
Result:   not run (target, published: 85.74 % top-1; spatial backpropagation 90.00 %, DFA 79.90 %,
zeroth order 49.04 %)"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.opzo import OPZO
from recipes.cifar.base import cifar


def recipe() -> Recipe:
    shared = cifar(10)
    return replace(
        shared,
        name="cifar10-opzo",
        model=shared.model.with_(stages=((128,), (256,), (512,), (512,))),
        rule=spec(OPZO),
    )
