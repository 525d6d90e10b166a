"""SLTT on moving shapes, whose direction no single time step tells.

Command:  spiketrain write events moving --out data/moving
          spiketrain launch recipes/events/moving_sltt.py --workers 2
Source:   Meng et al. 2023 (SLTT), arXiv:2302.14311; set and network are ours.
Result:   0.8431 top-1 on the 1,600 test recordings after 6 epochs, 3 seeds (0.8613, 0.8725,
          0.7956), each with --inline: one core of an AMD EPYC, under other load, a minute and a
          half a run; commit a3147a782acd
Below BPTT's 0.9977. SLTT leaves out the gradient through the membrane. Whether that is the cause
was not tested; docs/LOG.md."""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.sltt import SLTT
from recipes.events.base import moving


def recipe() -> Recipe:
    return replace(moving(lr=0.03), name="moving-sltt", rule=spec(SLTT))
