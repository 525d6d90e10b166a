"""Direct feedback alignment on the fully connected network of opzo_fc.py.

Command:  spiketrain launch recipes/fashion/opzo_fc_dfa.py --workers 2
Source:   Noekland 2016 (DFA), arXiv:1609.01596, as the baseline of Xiao et al. 2024 (OPZO),
          arXiv:2407.12516.
Result:   top-1 0.8837 on the 10,000 test images after 10 epochs, one seed, with --inline: one core
          of an AMD EPYC, under other load, 2 minutes; commit 15d3b0516162
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.opzo import OPZO
from recipes.fashion.opzo_fc import recipe as opzo_fc


def recipe() -> Recipe:
    return replace(opzo_fc(), name="fashion-opzo-fc-dfa", rule=spec(OPZO, feedback="random"))
