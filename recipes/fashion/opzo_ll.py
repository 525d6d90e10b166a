"""OPZO with a local readout behind each layer on Fashion-MNIST: its loss adds to what comes from
above.

Command:  spiketrain launch recipes/fashion/opzo_ll.py --workers 2
Source:   Xiao et al. 2024 (OPZO+LL), arXiv:2407.12516, which has no public code; the network is a
          small one of ours.
Result:   top-1 0.9024 (0.8987, 0.9043, 0.9042) on the 10,000 test images after 10 epochs, three
          seeds, each with --inline: one core of an AMD EPYC, under other load, 8 to 9 minutes a
          run; commit 15d3b0516162
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.opzo import OPZO
from recipes.fashion.opzo import recipe as opzo


def recipe() -> Recipe:
    return replace(opzo(), name="fashion-opzo-ll", rule=spec(OPZO, local_readouts=True))
