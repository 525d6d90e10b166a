"""VGG-sWS on CIFAR-10 by OTTT-O: the weights move at every time step, six times a batch.

Command:  spiketrain write folder --source cifar10 --out data/cifar10 --mode raw
          spiketrain launch recipes/cifar/cifar10_ottt_o.py --workers 1
Source:   Xiao et al. 2022 (OTTT), arXiv:2210.04195, the settings of OTTT-A, learning rate and
          momentum included.
Result:   not run (target, published: 93.49 +- 0.17 % top-1)
"""

from dataclasses import replace

from pipeline.recipe import Recipe
from recipes.cifar.cifar10_ottt_a import recipe as at_the_end_of_a_batch


def recipe() -> Recipe:
    shared = at_the_end_of_a_batch()
    return replace(shared, name="cifar10-ottt-o", rule=shared.rule.with_(update="step"))
