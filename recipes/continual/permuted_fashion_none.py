"""Ten permutations of Fashion-MNIST, one after another, by SLTT alone: what is forgotten where
nothing protects it.

Command:  spiketrain launch recipes/continual/permuted_fashion_none.py --workers 2
Source:   the tasks and the network as in Xiao et al. 2024 (HLOP), arXiv:2402.11984, with
          Fashion-MNIST for MNIST and T = 3.
Result:   on the 10,000 test images of every task, 3 seeds: ACC 0.5177 (0.5144, 0.5342, 0.5045), BWT
          -38.4 points (-38.8, -36.6, -39.9), last task 0.8600 (0.8580, 0.8603, 0.8617); each with
          --inline: one core of an AMD EPYC, under other load, 5 minutes a run; commit 15d3b0516162,
          c2f974888e7a
"""

from dataclasses import replace

from pipeline.recipe import Recipe
from recipes.continual.base import permuted


def recipe() -> Recipe:
    return replace(permuted(), name="permuted-fashion-none")
