"""IDE on SPIDE's network, so that the two differ in how they solve for the gradient and in nothing else.

Command:  spiketrain launch recipes/fashion/spide_ide.py --workers 2
Source:   Xiao et al. 2021 (IDE), arXiv:2109.14247, on the network of recipes/fashion/spide.py with its symmetric reset.
Result:   not run
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.ide import IDE
from recipes.fashion.spide import recipe as spide


def recipe() -> Recipe:
    return replace(spide(), name="fashion-spide-ide", rule=spec(IDE))
