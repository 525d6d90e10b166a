"""CIFARNet-F without norm on CIFAR-10 by SPIDE, IF at T = 30, 250 steps of the backward phase.

Command:  spiketrain write folder --source cifar10 --out data/cifar10 --mode raw
          spiketrain launch recipes/cifar/cifar10_cifarnet_f_spide.py --workers 1
Source:   Xiao et al. 2023 (SPIDE), arXiv:2302.00232, and the defaults of its code, those of
          AlexNet-F with dropout 0.25.
Result:   not run (the published accuracies were not available)
"""

from dataclasses import replace

from pipeline.recipe import Recipe
from recipes.cifar.cifar10_alexnet_f_spide import recipe as alexnet


def recipe() -> Recipe:
    shared = alexnet()
    return replace(
        shared,
        name="cifar10-cifarnet-f-spide",
        model=shared.model.with_(
            layers=((128, 3, 2), (256, 3, 1), (512, 3, 2), (1024, 3, 1), (512, 3, 1)),
            dropout=0.25,
        ),
    )
