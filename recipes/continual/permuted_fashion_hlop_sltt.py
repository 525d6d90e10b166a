"""Ten permutations of Fashion-MNIST, one after another, by SLTT within the directions that HLOP
leaves free.

Command:  spiketrain launch recipes/continual/permuted_fashion_hlop_sltt.py --workers 2
Source:   Xiao et al. 2024 (HLOP), arXiv:2402.11984: tasks, network and rows, with Fashion-MNIST for
          MNIST and T = 3. The optimizer is not the published one (base.py says why).
Result:   ran with wrong rows, 70, 70, 50, 70, 70, 50, 70, 70, 50 after the first task (720 frozen
          in layer 2 in task 10, published: 580), and was not run again. On the 10,000 test images
          of every task, 3 seeds: ACC 0.8430 (0.8423, 0.8432, 0.8434), BWT -1.8 points (-1.8, -1.8,
          -1.7), last task 0.8403 (0.8376, 0.8418, 0.8414); each with --inline: one core of an AMD
          EPYC, under other load, 22 to 23 minutes a run; commit 15d3b0516162, c2f974888e7a
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.sltt import SLTT
from recipes.continual.base import permuted, protected


def recipe() -> Recipe:
    return replace(protected(permuted(), spec(SLTT)), name="permuted-fashion-hlop-sltt")
