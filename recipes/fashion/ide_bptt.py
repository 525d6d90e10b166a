"""BPTT on IDE's network: the five steps unrolled with their graph, the spikes fed back one step
later.

Command:  spiketrain launch recipes/fashion/ide_bptt.py --workers 2
Source:   the network and settings of recipes/fashion/ide.py, one loss of the mean logits as there.
Result:   0.8972 top-1 on the 10,000 test images after 60 epochs, one run with --inline: one core of
          an AMD EPYC, 12 minutes; commit 216e051488a8
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.bptt import BPTT
from recipes.fashion.ide import recipe as ide


def recipe() -> Recipe:
    return replace(ide(), name="fashion-ide-bptt", rule=spec(BPTT))
