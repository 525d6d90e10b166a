"""PreAct-ResNet-18 on CIFAR-10 by DSR, leaky neurons at T = 5: a coarser dt, a higher threshold, a
smaller learning rate.

Command:  spiketrain write folder --source cifar10 --out data/cifar10 --mode raw
          spiketrain launch recipes/cifar/cifar10_dsr_lif_t5.py --workers 1
Source:   Meng et al. 2022 (DSR), arXiv:2205.00459, the published code's settings at T = 5: SGD
          0.05, threshold 0.6, dt 0.1, alpha 0.5, bound 1e-3; the rest as cifar10_dsr_lif.py.
Result:   not run (target, published: about 94.45 % top-1)
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.spiking.rate import RateLIF
from recipes.cifar.cifar10_dsr_lif import recipe as at_20


def recipe() -> Recipe:
    shared = at_20()
    return replace(
        shared,
        name="cifar10-dsr-lif-t5",
        model=shared.model.with_(
            neuron=spec(RateLIF, threshold=0.6, dt=0.1, alpha=0.5, bound=1e-3)
        ),
        optimizer=shared.optimizer.with_(lr=0.05),
        time_steps=5,
    )
