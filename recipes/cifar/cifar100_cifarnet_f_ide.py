"""CIFARNet-F on CIFAR-100 by IDE, IF at T = 100.

Command:  spiketrain write folder --source cifar100 --out data/cifar100 --mode raw
          spiketrain launch recipes/cifar/cifar100_cifarnet_f_ide.py --workers 1
Source:   Xiao et al. 2021 (IDE), arXiv:2109.14247, the settings of CIFAR-10.
Result:   not run (target, published: 73.07 % top-1, mean of several runs, best 73.43 %; T = 30:
          71.56 %)
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.spiking.neuron import IF
from recipes.cifar.base import images
from recipes.cifar.cifar10_cifarnet_f_ide import recipe as cifar10


def recipe() -> Recipe:
    shared = cifar10()
    return replace(
        shared,
        name="cifar100-cifarnet-f-ide",
        model=shared.model.with_(classes=100, neuron=spec(IF, threshold=2.0)),
        data=images(100),
    )
