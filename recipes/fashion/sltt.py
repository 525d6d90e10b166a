"""SLTT on Fashion-MNIST: the gradient through the network at each time step, and nothing through
time.

Command:  spiketrain launch recipes/fashion/sltt.py --workers 2 (decay 0.5: see base.py)
Source:   Meng et al. 2023 (SLTT), arXiv:2302.14311; the network is a small one of ours, in the form
          of OTTT's.
Result:   top-1 on the 10,000 test images after 10 epochs, mean of three seeds, each with --inline:
          at decay 1/11 and learning rate 0.6 0.9121 (0.9151, 0.9112, 0.9100); at decay 0.5 and 0.3
          0.9143 (0.9147, 0.9129, 0.9154); one core of an AMD EPYC, under other load, 7 minutes a
          run; commit 1c241ec47596 (BPTT, same seeds: see bptt.py; paired intervals in docs/LOG.md)
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.sltt import SLTT
from recipes.fashion.base import fashion


def recipe() -> Recipe:
    return replace(fashion(), name="fashion-sltt", rule=spec(SLTT))
