"""Ten permutations of Fashion-MNIST, one after another, by BPTT within the directions that HLOP
leaves free.

Command:  spiketrain launch recipes/continual/permuted_fashion_hlop_bptt.py --workers 2
Source:   Xiao et al. 2024 (HLOP), arXiv:2402.11984: tasks, network and rows, with Fashion-MNIST for
          MNIST and T = 3. The optimizer is not the published one (base.py says why).
Result:   on the 10,000 test images of every task, 2 seeds: ACC 0.8403 (0.8405, 0.8401), BWT -2.11
          points (-2.10, -2.12), last task 0.8530 (0.8541, 0.8520); each with --inline: one core of
          an AMD EPYC, under other load, 14 and 15 minutes; commit 9398500b0cc0
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.bptt import BPTT
from recipes.continual.base import permuted, protected


def recipe() -> Recipe:
    return replace(protected(permuted(), spec(BPTT)), name="permuted-fashion-hlop-bptt")
