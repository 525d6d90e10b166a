"""BPTT on Fashion-MNIST: the baseline of every rule that trains the same network.

Command:  spiketrain launch recipes/fashion/bptt.py --workers 2        (leak 0.5: see base.py)
Source:   Neftci et al. 2019, arXiv:1901.09948; the network is a small one of ours, in the form of OTTT's.
Result:   0.9026 top-1 on the 10,000 test images after 12 epochs, one run with --inline: one core of an AMD EPYC, other work
          beside it, 10 minutes; commit 2da429644653 (target 0.91)
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.recipe import Recipe
from recipes.fashion.base import fashion


def recipe() -> Recipe:
    return replace(fashion(), name="fashion-bptt")
