"""BPTT on moving shapes, whose direction no single time step tells.

Command:  spiketrain write events moving --out data/moving
          spiketrain launch recipes/events/moving_bptt.py --workers 2
Source:   Neftci et al. 2019, arXiv:1901.09948 (surrogate gradients through time); set and network are ours.
Result:   not run
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.bptt import BPTT
from recipes.events.base import moving


def recipe() -> Recipe:
    return replace(moving(lr=0.01), name="moving-bptt", rule=spec(BPTT))
