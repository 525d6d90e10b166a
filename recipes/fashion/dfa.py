"""Direct feedback alignment on OPZO's network: fixed random matrices in the place of those that are
learnt.

Command:  spiketrain launch recipes/fashion/dfa.py --workers 2
Source:   Noekland 2016 (DFA), arXiv:1609.01596, as the baseline of Xiao et al. 2024 (OPZO),
          arXiv:2407.12516.
Result:   top-1 0.8380 (0.8389, 0.8351, 0.8400) on the 10,000 test images after 10 epochs, three
          seeds, each with --inline: one core of an AMD EPYC, under other load, 4 to 5 minutes a
          run; commit 15d3b0516162
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.opzo import OPZO
from recipes.fashion.opzo import recipe as opzo


def recipe() -> Recipe:
    return replace(opzo(), name="fashion-dfa", rule=spec(OPZO, feedback="random"))
