"""SLTT on Fashion-MNIST, long enough to be good at it.

Command:  spiketrain launch recipes/fashion/sltt.py --workers 2
Source:   Meng et al. 2023 (SLTT), arXiv:2302.14311; the network is a small NF-ResNet of ours.
Result:   0.9129 top-1 on the 10,000 test images after 15 epochs, one run; commit 61c6e55494d6, 2 cores of an AMD EPYC that
          other work was using, 35 minutes
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.recipe import Recipe
from recipes.fashion.base import fashion


def recipe() -> Recipe:
    shared = fashion()
    return replace(
        shared,
        name="fashion-sltt",
        model=shared.model.with_(width=32),
        time_steps=4,
        epochs=15,
    )
