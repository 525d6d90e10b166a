"""BPTT that keeps the membranes alone and computes each time step again in the backward: the same gradient, less memory.

Command:  spiketrain launch recipes/fashion/bptt_recompute.py --workers 2
Source:   Chen et al. 2016, arXiv:1604.06174, with one segment for each time step.
Result:   not run
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.bptt import BPTT
from recipes.fashion.base import fashion


def recipe() -> Recipe:
    return replace(fashion(), name="fashion-bptt-recompute", rule=spec(BPTT, recompute=True))
