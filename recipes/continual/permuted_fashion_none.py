"""Ten permutations of Fashion-MNIST, one after another, by SLTT alone: what is forgotten where nothing protects it.

Command:  spiketrain launch recipes/continual/permuted_fashion_none.py --workers 2
Source:   the tasks and the network as in Xiao et al. 2024 (HLOP), arXiv:2402.11984, with Fashion-MNIST for MNIST and T = 3.
Result:   not run
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.recipe import Recipe
from recipes.continual.base import permuted


def recipe() -> Recipe:
    return replace(permuted(), name="permuted-fashion-none")
