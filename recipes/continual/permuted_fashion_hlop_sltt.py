"""Ten permutations of Fashion-MNIST, one after another, by SLTT within the directions that HLOP
leaves free.

Command:  spiketrain launch recipes/continual/permuted_fashion_hlop_sltt.py --workers 2
Source:   Xiao et al. 2024 (HLOP), arXiv:2402.11984: tasks, network and rows, with Fashion-MNIST for
          MNIST and T = 3. The optimizer is not the published one (base.py says why).
Result:   on the 10,000 test images of every task, 3 seeds: ACC 0.8444 (0.8442, 0.8445, 0.8445),
          BWT -1.83 points (-1.80, -1.87, -1.81), last task 0.8532 (0.8528, 0.8548, 0.8521);
          each with --inline: one core of an AMD EPYC, 21 to 24 minutes; commit 216e051488a8
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.sltt import SLTT
from recipes.continual.base import permuted, protected


def recipe() -> Recipe:
    return replace(protected(permuted(), spec(SLTT)), name="permuted-fashion-hlop-sltt")
