"""SLTT on moving shapes, whose direction no count summed over time can tell.

Command:  spiketrain write events moving --out data/moving
          spiketrain launch recipes/events/moving_sltt.py --workers 2
Source:   Meng et al. 2023 (SLTT), arXiv:2302.14311; set and network are ours.
Result:   0.9962 top-1 on the 1,600 test recordings after 6 epochs, one run with --inline: one core of an AMD EPYC, other work
          beside it, one minute; commit 1c241ec47596
Why it learns what needs time: the forward carries the membrane, and late steps tell most of it without (.92 at leak 0, under
BPTT, SLTT and OTTT alike, on a held-out tenth); docs/LOG.md.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.sltt import SLTT
from recipes.events.base import moving


def recipe() -> Recipe:
    return replace(moving(), name="moving-sltt", rule=spec(SLTT))
