"""VGG-sWS on CIFAR-10 by OTTT-A.

Command:  spiketrain write folder --source cifar10 --out data/cifar10 --mode raw
          spiketrain launch recipes/cifar/cifar10_ottt_a.py --workers 1
Source:   Xiao et al. 2022 (OTTT), arXiv:2210.04195: T = 6, batch 128, 300 epochs, SGD 0.1 with
          cosine, no weight decay, decay 0.5, 5 % squared error to the one-hot target. They are the
          defaults of the published code, whose README says that they are the paper's; it adds
          Cutout, which is not part of this recipe.
Result:   not run (target, published: 93.52 +- 0.06 % top-1; BPTT on the same network 92.78 +- 0.34
          %)
"""

from dataclasses import replace

from pipeline.recipe import Recipe
from recipes.cifar.base import cifar


def recipe() -> Recipe:
    return replace(cifar(10), name="cifar10-ottt-a")
