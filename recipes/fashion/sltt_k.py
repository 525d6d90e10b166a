"""SLTT-1 on Fashion-MNIST: one random time step of the four is differentiated.

Command:  spiketrain launch recipes/fashion/sltt_k.py --workers 2
Source:   Meng et al. 2023 (SLTT-K), arXiv:2302.14311; as published there is no rescaling, which
          under SGD is a learning rate four times smaller than that of the rules beside it;
          `rescale` gives the expectation of SLTT's gradient.
Result:   0.9126 top-1 on the 10,000 test images after 10 epochs, one run with --inline: one core of
          an AMD EPYC, under other load, 5 minutes; commit cd65a7941c5d
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.sltt import SLTT
from recipes.fashion.base import fashion


def recipe() -> Recipe:
    return replace(fashion(), name="fashion-sltt-1", rule=spec(SLTT, k=1, rescale=True))
