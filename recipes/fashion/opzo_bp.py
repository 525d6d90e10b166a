"""Backpropagation through space on OPZO's network: OTTT-A, whose neurons and traces OPZO shares.

Command:  spiketrain launch recipes/fashion/opzo_bp.py --workers 2
Source:   Xiao et al. 2022 (OTTT), arXiv:2210.04195, as the baseline of Xiao et al. 2024 (OPZO), arXiv:2407.12516.
Result:   not run
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.ottt import OTTT
from recipes.fashion.opzo import recipe as opzo


def recipe() -> Recipe:
    return replace(opzo(), name="fashion-opzo-bp", rule=spec(OTTT))
