"""DSR with leaky neurons on Fashion-MNIST at T = 10, the network of ann.py; the logits are weighted
rates.

Command:  spiketrain launch recipes/fashion/dsr_lif.py --workers 2
Source:   Meng et al. 2022 (DSR), arXiv:2205.00459; the network is a small one of ours, and the
          gradient is that of the rates, not the published code's for LIF (pipeline/rules/dsr.py).
Result:   0.9134 top-1 on the 10,000 test images after 8 epochs, one run with --inline: one core of
          an AMD EPYC, under other load, 15 minutes; commit 1c241ec47596 (the ANN of the same
          layers: 0.9174)
The threshold of 0.15 is a height of 3, as dsr_if.py has it.
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.spiking.rate import RateLIF
from recipes.fashion.dsr_if import recipe as dsr_if


def recipe() -> Recipe:
    shared = dsr_if()
    return replace(
        shared,
        name="fashion-dsr-lif",
        model=shared.model.with_(neuron=spec(RateLIF, threshold=0.15)),
    )
