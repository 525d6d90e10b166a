"""OTTT-O on Fashion-MNIST: the weights move at every time step.

Command:  spiketrain launch recipes/fashion/ottt_o.py --workers 2
Source:   Xiao et al. 2022 (OTTT), arXiv:2210.04195, for the rule; the network is a small one of
          ours.
Result:   0.9144 top-1 on the 10,000 test images after 10 epochs, one run with --inline: one core of
          an AMD EPYC, under other load, 8 minutes; commit cd65a7941c5d
"""

from dataclasses import replace

from pipeline.recipe import Recipe
from recipes.fashion.ottt_a import recipe as at_the_end_of_a_batch


def recipe() -> Recipe:
    shared = at_the_end_of_a_batch()
    return replace(shared, name="fashion-ottt-o", rule=shared.rule.with_(update="step"))
