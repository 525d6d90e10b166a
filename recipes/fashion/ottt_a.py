"""OTTT-A on Fashion-MNIST: the weights move once a batch.

Command:  spiketrain launch recipes/fashion/ottt_a.py --workers 2
Source:   Xiao et al. 2022 (OTTT), arXiv:2210.04195, for the rule; the network is a small one of
          ours.
Result:   top-1 on the 10,000 test images after 10 epochs, mean of three seeds, each with --inline:
          at decay 1/11 and learning rate 0.6 0.9109 (0.9110, 0.9109, 0.9108); at decay 0.5 and 0.3
          0.9152 (0.9169, 0.9147, 0.9141); one core of an AMD EPYC, under other load, 7 minutes a
          run; commit 1c241ec47596 (BPTT, same seeds: see bptt.py; paired intervals in docs/LOG.md)
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.ottt import OTTT
from recipes.fashion.base import fashion


def recipe() -> Recipe:
    return replace(fashion(), name="fashion-ottt-a", rule=spec(OTTT))
