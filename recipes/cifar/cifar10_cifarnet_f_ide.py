"""CIFARNet-F on CIFAR-10 by IDE, LIF at T = 100.

Command:  spiketrain write folder --source cifar10 --out data/cifar10 --mode raw
          spiketrain launch recipes/cifar/cifar10_cifarnet_f_ide.py --workers 1
Source:   Xiao et al. 2021 (IDE), arXiv:2109.14247, the settings of AlexNet-F.
Result:   not run (target, published: 92.52 % top-1, mean of several runs, best 92.82 %; T = 30:
          92.08 %)
"""

from dataclasses import replace

from pipeline.models.feedback import cifarnet_f
from pipeline.recipe import Recipe, Spec
from recipes.cifar.cifar10_alexnet_f_ide import recipe as alexnet


def recipe() -> Recipe:
    shared = alexnet()
    return replace(
        shared,
        name="cifar10-cifarnet-f-ide",
        model=Spec(cifarnet_f, shared.model.kwargs),
        time_steps=100,
    )
