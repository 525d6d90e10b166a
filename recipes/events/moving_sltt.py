"""SLTT on moving shapes, whose direction no single time step tells.

Command:  spiketrain write events moving --out data/moving
          spiketrain launch recipes/events/moving_sltt.py --workers 2
Source:   Meng et al. 2023 (SLTT), arXiv:2302.14311; set and network are ours.
Result:   not run
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.sltt import SLTT
from recipes.events.base import moving


def recipe() -> Recipe:
    return replace(moving(lr=0.03), name="moving-sltt", rule=spec(SLTT))
