"""Ten permutations of Fashion-MNIST, one after another, by BPTT within the directions that HLOP
leaves free.

Command:  spiketrain launch recipes/continual/permuted_fashion_hlop_bptt.py --workers 2
Source:   Xiao et al. 2024 (HLOP), arXiv:2402.11984: tasks, network and rows, with Fashion-MNIST for
          MNIST and T = 3. The optimizer is not the published one (base.py says why).
Result:   ran with wrong rows, 70, 70, 50, 70, 70, 50, 70, 70, 50 after the first task (720 frozen
          in layer 2 in task 10, published: 580), and was not run again. On the 10,000 test images
          of every task, one run: ACC 0.8398, BWT -2.0 points, last task 0.8399; with --inline: one
          core of an AMD EPYC, under other load, 20 minutes; commit 3321c9f2391e
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.bptt import BPTT
from recipes.continual.base import permuted, protected


def recipe() -> Recipe:
    return replace(protected(permuted(), spec(BPTT)), name="permuted-fashion-hlop-bptt")
