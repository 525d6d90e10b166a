"""BPTT that computes each half of the time steps again in the backward: the same gradient, less
memory.

Command:  spiketrain launch recipes/fashion/bptt_recompute.py --workers 2
Source:   Chen et al. 2016, arXiv:1604.06174, with two segments of T.
Result:   0.9128 top-1 on the 10,000 test images after 10 epochs, with one segment for each step,
          one run with --inline: one core of an AMD EPYC, under other load, 11 minutes; commit
          cd65a7941c5d
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.bptt import BPTT
from recipes.fashion.base import fashion


def recipe() -> Recipe:
    return replace(fashion(), name="fashion-bptt-recompute", rule=spec(BPTT, recompute=True))
