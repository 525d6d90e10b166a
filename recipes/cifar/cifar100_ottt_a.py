"""VGG-sWS on CIFAR-100 by OTTT-A.

Command:  spiketrain write folder --source cifar100 --out data/cifar100 --mode raw
          spiketrain launch recipes/cifar/cifar100_ottt_a.py --workers 1
Source:   Xiao et al. 2022 (OTTT), arXiv:2210.04195: the settings of CIFAR-10, its mean and standard
          deviation included.
Result:   not run (target, published: 71.05 +- 0.04 % top-1; BPTT on the same network 69.06 +- 0.07
          %)
"""

from dataclasses import replace

from pipeline.recipe import Recipe
from recipes.cifar.base import cifar


def recipe() -> Recipe:
    return replace(cifar(100), name="cifar100-ottt-a")
