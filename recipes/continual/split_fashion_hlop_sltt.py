"""The classes of Fashion-MNIST two at a time, a head for each pair, by SLTT within the directions
that HLOP leaves free.

Command:  spiketrain launch recipes/continual/split_fashion_hlop_sltt.py --workers 2
Source:   tasks with heads of their own as in Xiao et al. 2024 (HLOP), arXiv:2402.11984, there of
          CIFAR-100; their MLP.
Result:   ACC 0.9880, BWT -0.2 points, last task 0.9965 on the test images of five tasks, one seed,
          with --inline: one core of an AMD EPYC, under other load, 91 s; commit cd65a7941c5d
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.sltt import SLTT
from recipes.continual.base import protected, split

# Of the two layers that tasks share; the heads, one for each task, need no protection.
ROWS, RATES = ((80, 200), (70, 70)), (0.001, 0.01)


def recipe() -> Recipe:
    shared = protected(split(), spec(SLTT), rows=ROWS, learning_rate=RATES, skip=("classifier",))
    return replace(shared, name="split-fashion-hlop-sltt")
