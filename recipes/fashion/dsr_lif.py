"""DSR with leaky neurons on Fashion-MNIST at T = 10, the network of ann.py; the logits are weighted rates.

Command:  spiketrain launch recipes/fashion/dsr_lif.py --workers 2
Source:   Meng et al. 2022 (DSR), arXiv:2205.00459; the network is a small one of ours.
Result:   not run
The threshold of 0.15 is a height of 3, as dsr_if.py has it.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.spiking.rate import RateLIF
from recipes.fashion.dsr_if import recipe as dsr_if


def recipe() -> Recipe:
    shared = dsr_if()
    return replace(shared, name="fashion-dsr-lif", model=shared.model.with_(neuron=spec(RateLIF, threshold=0.15)))
