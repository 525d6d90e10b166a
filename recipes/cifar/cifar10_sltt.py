"""PreAct-ResNet-18 on CIFAR-10 by SLTT.

Command:  spiketrain write folder --source cifar10 --out data/cifar10 --mode raw
          spiketrain launch recipes/cifar/cifar10_sltt.py --workers 1
Source:   Meng et al. 2023 (SLTT), arXiv:2302.14311: T = 6, batch 128, 200 epochs, SGD 0.1 with
          cosine, weight decay 5e-5, decay 1/11, 5 % squared error to a constant 1. The published
          Cutout is not part of this recipe.
Result:   not run (target, published: 94.59 % top-1; BPTT on the same network 94.60 %)

The published BPTT keeps the gradient through the reset. Here the default detaches it; `--set
model.neuron.reset_gradient=kept` keeps it.
"""

from dataclasses import replace

from pipeline.recipe import Recipe
from recipes.cifar.sltt_base import sltt


def recipe() -> Recipe:
    return replace(sltt(10, weight_decay=5e-5), name="cifar10-sltt")
