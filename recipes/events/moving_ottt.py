"""OTTT on moving shapes, whose direction no single time step tells.

Command:  spiketrain write events moving --out data/moving
          spiketrain launch recipes/events/moving_ottt.py --workers 2
Source:   Xiao et al. 2022 (OTTT), arXiv:2210.04195; set and network are ours.
Result:   0.9804 top-1 on the 1,600 test recordings after 6 epochs, 3 seeds (0.9869, 0.9775,
          0.9769), each with --inline: one core of an AMD EPYC, under other load, a minute and a
          half a run; commit a3147a782acd
Below BPTT's 0.9977. OTTT leaves out the gradient from a layer's past to the layer before it.
Whether that is the cause was not tested; docs/LOG.md.
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.ottt import OTTT
from recipes.events.base import moving


def recipe() -> Recipe:
    return replace(moving(lr=0.03), name="moving-ottt", rule=spec(OTTT))
