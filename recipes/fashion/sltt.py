"""SLTT on Fashion-MNIST: the gradient through the network at each time step, and nothing through time.

Command:  spiketrain launch recipes/fashion/sltt.py --workers 2        (leak 0.5: see base.py)
Source:   Meng et al. 2023 (SLTT), arXiv:2302.14311; the network is a small one of ours, in the form of OTTT's.
Result:   0.9036 top-1 on the 10,000 test images after 12 epochs, one run with --inline: one core of an AMD EPYC, other work
          beside it, 18 minutes; commit 2da429644653 (BPTT, same seed: 0.9026)
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.sltt import SLTT
from recipes.fashion.base import fashion


def recipe() -> Recipe:
    return replace(fashion(), name="fashion-sltt", rule=spec(SLTT))
