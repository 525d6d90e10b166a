"""The classes of Fashion-MNIST two at a time, a head for each pair, by SLTT alone: what is
forgotten where nothing protects it.

Command:  spiketrain launch recipes/continual/split_fashion_none.py --workers 2
Source:   tasks with heads of their own as in Xiao et al. 2024 (HLOP), arXiv:2402.11984, there of
          CIFAR-100; their MLP.
Result:   ACC 0.7763, BWT -26.8 points, last task 0.9975 on the test images of five tasks, one seed,
          with --inline: one core of an AMD EPYC, under other load, 37 s; commit cd65a7941c5d
"""

from dataclasses import replace

from pipeline.recipe import Recipe
from recipes.continual.base import split


def recipe() -> Recipe:
    return replace(split(), name="split-fashion-none")
