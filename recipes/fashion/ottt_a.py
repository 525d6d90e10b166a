"""OTTT-A on Fashion-MNIST: the weights move once a batch.

Command:  spiketrain launch recipes/fashion/ottt_a.py --workers 2
Source:   Xiao et al. 2022 (OTTT), arXiv:2210.04195, for the rule; the network is a small one of ours.
Result:   not run
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.ottt import OTTT
from recipes.fashion.base import fashion


def recipe() -> Recipe:
    return replace(fashion(), name="fashion-ottt-a", rule=spec(OTTT))
