"""VGG-F, whose last features come back to its first layer a time step later, on CIFAR-100 by
OTTT-A.

Command:  spiketrain write folder --source cifar100 --out data/cifar100 --mode raw
          spiketrain launch recipes/cifar/cifar100_vgg_f_ottt_a.py --workers 1
Source:   Xiao et al. 2022 (OTTT), arXiv:2210.04195, the settings of the network without feedback.
Result:   not run (target, published: 72.63 +- 0.23 % top-1; without feedback 71.05 +- 0.04 %)
"""

from dataclasses import replace

from pipeline.models.vgg import vgg_sws_f
from pipeline.recipe import Recipe, Spec
from recipes.cifar.cifar100_ottt_a import recipe as without_feedback


def recipe() -> Recipe:
    shared = without_feedback()
    return replace(shared, name="cifar100-vgg-f-ottt-a", model=Spec(vgg_sws_f, shared.model.kwargs))
