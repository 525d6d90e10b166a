"""The classes of Fashion-MNIST two at a time, a head for each pair, by SLTT alone: what is forgotten where nothing protects it.

Command:  spiketrain launch recipes/continual/split_fashion_none.py --workers 2
Source:   tasks with heads of their own as in Xiao et al. 2024 (HLOP), arXiv:2402.11984, there of CIFAR-100; their MLP.
Result:   not run
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.recipe import Recipe
from recipes.continual.base import split


def recipe() -> Recipe:
    return replace(split(), name="split-fashion-none")
