"""Ten permutations of Fashion-MNIST, one after another, by OTTT within the directions that HLOP
leaves free.

Command:  spiketrain launch recipes/continual/permuted_fashion_hlop_ottt.py --workers 2
Source:   Xiao et al. 2024 (HLOP), arXiv:2402.11984: tasks, network and rows, with Fashion-MNIST for
          MNIST and T = 3. The optimizer is not the published one (base.py says why).
Result:   on the 10,000 test images of every task, 2 seeds: ACC 0.8452 (0.8447, 0.8457), BWT -1.89
          points (-1.94, -1.84), last task 0.8544 (0.8560, 0.8529); each with --inline: one core of
          an AMD EPYC, under other load, 22 and 25 minutes; commit 9398500b0cc0
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.ottt import OTTT
from recipes.continual.base import permuted, protected


def recipe() -> Recipe:
    return replace(
        protected(permuted(), spec(OTTT), learn_from="traces"), name="permuted-fashion-hlop-ottt"
    )
