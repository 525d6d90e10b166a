"""Ten permutations of Fashion-MNIST, one after another, by BPTT within the directions that HLOP leaves free.

Command:  spiketrain launch recipes/continual/permuted_fashion_hlop_bptt.py --workers 2
Source:   Xiao et al. 2024 (HLOP), arXiv:2402.11984: tasks, network, optimizer and rows, with Fashion-MNIST for MNIST and T = 3.
Result:   not run
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.bptt import BPTT
from recipes.continual.base import permuted, protected


def recipe() -> Recipe:
    return replace(protected(permuted(), spec(BPTT)), name="permuted-fashion-hlop-bptt")
