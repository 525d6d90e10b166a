"""BPTT on the network of dsr_if.py: the baseline of the rate-coded study, through the surrogate of
the same neurons.

Command:  spiketrain launch recipes/fashion/dsr_if_bptt.py --workers 2
Source:   Neftci et al. 2019, arXiv:1901.09948; the network is a small one of ours.
Result:   0.9048 top-1 on the 10,000 test images after 8 epochs, one run with --inline: one core of
          an AMD EPYC, under other load, 23 minutes; commit 3321c9f2391e (DSR on this network:
          0.9161; after two epochs it led by ten points)
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.bptt import BPTT
from recipes.fashion.dsr_if import recipe as dsr_if


def recipe() -> Recipe:
    return replace(dsr_if(), name="fashion-dsr-if-bptt", rule=spec(BPTT))
