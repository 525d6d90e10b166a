"""Backpropagation through space on the fully connected network of opzo_fc.py: OTTT-A.

Command:  spiketrain launch recipes/fashion/opzo_fc_bp.py --workers 2
Source:   Xiao et al. 2022 (OTTT), arXiv:2210.04195, as the baseline of Xiao et al. 2024 (OPZO),
          arXiv:2407.12516.
Result:   top-1 0.8865 on the 10,000 test images after 10 epochs, one seed, with --inline: one core
          of an AMD EPYC, under other load, 1 minute; commit 15d3b0516162
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.ottt import OTTT
from recipes.fashion.opzo_fc import recipe as opzo_fc


def recipe() -> Recipe:
    return replace(opzo_fc(), name="fashion-opzo-fc-bp", rule=spec(OTTT))
