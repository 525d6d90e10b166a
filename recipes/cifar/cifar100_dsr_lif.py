"""PreAct-ResNet-18 on CIFAR-100 by DSR, leaky neurons at T = 20.

Command:  spiketrain write folder --source cifar100 --out data/cifar100 --mode raw
          spiketrain launch recipes/cifar/cifar100_dsr_lif.py --workers 1
Source:   Meng et al. 2022 (DSR), arXiv:2205.00459: the settings of cifar10_dsr_lif.py, CIFAR-100's
          mean and deviation.
Result:   not run (target, unconfirmed: 78.50 % top-1)
"""

from dataclasses import replace

from pipeline.recipe import Recipe
from recipes.cifar.base import CIFAR100, images
from recipes.cifar.cifar10_dsr_lif import recipe as cifar10


def recipe() -> Recipe:
    shared = cifar10()
    return replace(
        shared,
        name="cifar100-dsr-lif",
        model=shared.model.with_(classes=100),
        data=images(100, statistics=CIFAR100),
    )
