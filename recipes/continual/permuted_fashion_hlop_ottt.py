"""Ten permutations of Fashion-MNIST, one after another, by OTTT within the directions that HLOP
leaves free.

Command:  spiketrain launch recipes/continual/permuted_fashion_hlop_ottt.py --workers 2
Source:   Xiao et al. 2024 (HLOP), arXiv:2402.11984: tasks, network and rows, with Fashion-MNIST for
          MNIST and T = 3. The optimizer is not the published one (base.py says why).
Result:   ran with wrong rows, 70, 70, 50, 70, 70, 50, 70, 70, 50 after the first task (720 frozen
          in layer 2 in task 10, published: 580), and was not run again. On the 10,000 test images
          of every task, one run: ACC 0.8415, BWT -2.0 points, last task 0.8388; with --inline: one
          core of an AMD EPYC, under other load, 30 minutes; commit 3321c9f2391e
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.ottt import OTTT
from recipes.continual.base import permuted, protected


def recipe() -> Recipe:
    return replace(
        protected(permuted(), spec(OTTT), learn_from="traces"), name="permuted-fashion-hlop-ottt"
    )
