"""PreAct-ResNet-18 on CIFAR-10 by DSR, integrate-and-fire neurons at T = 20.

Command:  spiketrain write folder --source cifar10 --out data/cifar10 --mode raw
          spiketrain launch recipes/cifar/cifar10_dsr_if.py --workers 1
Source:   Meng et al. 2022 (DSR), arXiv:2205.00459: as cifar10_dsr_lif.py, threshold 6, alpha 0.5.
          The published backward of IF is the exact gradient of the rates.
Result:   not run
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.dsr import DSR
from pipeline.spiking.rate import RateIF
from recipes.cifar.cifar10_dsr_lif import recipe as by_lif


def recipe() -> Recipe:
    shared = by_lif()
    return replace(
        shared, name="cifar10-dsr-if", model=shared.model.with_(neuron=spec(RateIF)), rule=spec(DSR)
    )
