"""OTTT on moving shapes, whose direction no single time step tells.

Command:  spiketrain write events moving --out data/moving
          spiketrain launch recipes/events/moving_ottt.py --workers 2
Source:   Xiao et al. 2022 (OTTT), arXiv:2210.04195; set and network are ours.
Result:   not run
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.ottt import OTTT
from recipes.events.base import moving


def recipe() -> Recipe:
    return replace(moving(lr=0.03), name="moving-ottt", rule=spec(OTTT))
