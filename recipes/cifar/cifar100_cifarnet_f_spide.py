"""CIFARNet-F without norm on CIFAR-100 by SPIDE, IF at T = 30, 250 steps of the backward phase.

Command:  spiketrain write folder --source cifar100 --out data/cifar100 --mode raw
          spiketrain launch recipes/cifar/cifar100_cifarnet_f_spide.py --workers 1
Source:   Xiao et al. 2023 (SPIDE), arXiv:2302.00232, and the defaults of its code: those of
          CIFAR-10 with S = 500.
Result:   not run (the published accuracies were not available)
"""

from dataclasses import replace

from pipeline.recipe import Recipe
from recipes.cifar.base import images
from recipes.cifar.cifar10_cifarnet_f_spide import recipe as cifar10

S = 500


def recipe() -> Recipe:
    shared = cifar10()
    return replace(
        shared,
        name="cifar100-cifarnet-f-spide",
        model=shared.model.with_(classes=100),
        rule=shared.rule.with_(scale=S / 128),
        data=images(100),
        optimizer=shared.optimizer.with_(weight_decay=5e-4 / S),
    )
