"""OPZO with a local readout behind each layer on Fashion-MNIST: its loss adds to what comes from above.

Command:  spiketrain launch recipes/fashion/opzo_ll.py --workers 2
Source:   Xiao et al. 2024 (OPZO+LL), arXiv:2407.12516, which has no public code; the network is a small one of ours.
Result:   not run
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.opzo import OPZO
from recipes.fashion.opzo import recipe as opzo


def recipe() -> Recipe:
    return replace(opzo(), name="fashion-opzo-ll", rule=spec(OPZO, local_readouts=True))
