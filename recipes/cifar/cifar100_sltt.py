"""PreAct-ResNet-18 on CIFAR-100 by SLTT.

Command:  spiketrain write folder --source cifar100 --out data/cifar100 --mode raw
          spiketrain launch recipes/cifar/cifar100_sltt.py --workers 1
Source:   Meng et al. 2023 (SLTT), arXiv:2302.14311: T = 6, batch 128, 200 epochs, SGD 0.1 with
          cosine, weight decay 5e-4, decay 1/11, 5 % squared error to a constant 1. The published
          Cutout is not part of this recipe.
Result:   not run (target, published: 74.67 % top-1; BPTT on the same network 73.80 %)

The published BPTT keeps the gradient through the reset. Here the default detaches it; `--set
model.neuron.reset_gradient=kept` keeps it.
"""

from dataclasses import replace

from pipeline.recipe import Recipe
from recipes.cifar.sltt_base import sltt


def recipe() -> Recipe:
    return replace(sltt(100, weight_decay=5e-4), name="cifar100-sltt")
