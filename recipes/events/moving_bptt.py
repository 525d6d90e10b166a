"""BPTT on moving shapes, whose direction no count summed over time can tell.

Command:  spiketrain write events moving --out data/moving
          spiketrain launch recipes/events/moving_bptt.py --workers 2
Source:   Neftci et al. 2019, arXiv:1901.09948 (surrogate gradients through time); set and network are ours.
Result:   1.0000 top-1 on the 1,600 test recordings after 6 epochs, one run with --inline: one core of an AMD EPYC, other work
          beside it, one minute; commit 1c241ec47596
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.bptt import BPTT
from recipes.events.base import moving


def recipe() -> Recipe:
    return replace(moving(), name="moving-bptt", rule=spec(BPTT))
