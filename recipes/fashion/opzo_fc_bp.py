"""Backpropagation through space on the fully connected network of opzo_fc.py: OTTT-A.

Command:  spiketrain launch recipes/fashion/opzo_fc_bp.py --workers 2
Source:   Xiao et al. 2022 (OTTT), arXiv:2210.04195, as the baseline of Xiao et al. 2024 (OPZO), arXiv:2407.12516.
Result:   not run
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.ottt import OTTT
from recipes.fashion.opzo_fc import recipe as opzo_fc


def recipe() -> Recipe:
    return replace(opzo_fc(), name="fashion-opzo-fc-bp", rule=spec(OTTT))
