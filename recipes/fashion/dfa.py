"""Direct feedback alignment on OPZO's network: fixed random matrices in the place of those that are learnt.

Command:  spiketrain launch recipes/fashion/dfa.py --workers 2
Source:   Noekland 2016 (DFA), arXiv:1609.01596, as the baseline of Xiao et al. 2024 (OPZO), arXiv:2407.12516.
Result:   not run
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.opzo import OPZO
from recipes.fashion.opzo import recipe as opzo


def recipe() -> Recipe:
    return replace(opzo(), name="fashion-dfa", rule=spec(OPZO, feedback="random"))
