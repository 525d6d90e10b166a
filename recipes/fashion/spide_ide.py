"""IDE on SPIDE's network, so that the two differ in how they solve for the gradient and in nothing
else.

Command:  spiketrain launch recipes/fashion/spide_ide.py --workers 2
Source:   Xiao et al. 2021 (IDE), arXiv:2109.14247, on the network of recipes/fashion/spide.py with
          its symmetric reset.
Result:   0.8941 top-1 on the 10,000 test images after 20 epochs, one run with --inline: one core of
          an AMD EPYC, 5 minutes; commit 216e051488a8
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.ide import IDE
from recipes.fashion.spide import recipe as spide


def recipe() -> Recipe:
    return replace(spide(), name="fashion-spide-ide", rule=spec(IDE))
