"""Backpropagation through space on OPZO's network: OTTT-A, whose neurons and traces OPZO shares.

Command:  spiketrain launch recipes/fashion/opzo_bp.py --workers 2
Source:   Xiao et al. 2022 (OTTT), arXiv:2210.04195, as the baseline of Xiao et al. 2024 (OPZO),
          arXiv:2407.12516.
Result:   top-1 0.9142 (0.9133, 0.9135, 0.9158) on the 10,000 test images after 10 epochs, three
          seeds, each with --inline: one core of an AMD EPYC, under other load, 4 minutes a run;
          commit 15d3b0516162; at its own best learning rate on the held-out tenth, 0.03: 0.9164
          (0.9180, 0.9155, 0.9158)
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.ottt import OTTT
from recipes.fashion.opzo import recipe as opzo


def recipe() -> Recipe:
    return replace(opzo(), name="fashion-opzo-bp", rule=spec(OTTT))
