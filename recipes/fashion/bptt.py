"""BPTT on Fashion-MNIST: the baseline of every rule that trains the same network.

Command:  spiketrain launch recipes/fashion/bptt.py --workers 2 (decay 0.5: see base.py)
Source:   Neftci et al. 2019, arXiv:1901.09948; the network is a small one of ours, in the form of
          OTTT's.
Result:   top-1 on the 10,000 test images after 10 epochs, mean of three seeds, each with --inline:
          at decay 1/11 and learning rate 0.6 0.9115 (0.9121, 0.9123, 0.9101); at decay 0.5 and 0.3
          0.9158 (0.9172, 0.9135, 0.9167); one core of an AMD EPYC, under other load, 6 to 7 minutes
          a run; commit 1c241ec47596 (target 0.91). With the reset's gradient kept (`--set
          model.neuron.reset_gradient=kept`), as in SLTT's published BPTT: 0.9136 at decay 1/11,
          seed 0; commit 7e0b3e633c90
"""

from dataclasses import replace

from pipeline.recipe import Recipe
from recipes.fashion.base import fashion


def recipe() -> Recipe:
    return replace(fashion(), name="fashion-bptt")
