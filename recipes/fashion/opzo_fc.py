"""OPZO on Fashion-MNIST with a fully connected network, where fixed random feedback does about as
well.

Command:  spiketrain launch recipes/fashion/opzo_fc.py --workers 2
Source:   Xiao et al. 2024 (OPZO), arXiv:2407.12516, for the rule, which has no public code; the
          network is one of ours.
Result:   top-1 0.8820 on the 10,000 test images after 10 epochs, one seed, with --inline: one core
          of an AMD EPYC, under other load, 2 minutes; commit 15d3b0516162
"""

from dataclasses import replace

from pipeline.models.mlp import mlp
from pipeline.recipe import Recipe, spec
from pipeline.spiking.neuron import LIF
from recipes.fashion.opzo import recipe as opzo


def recipe() -> Recipe:
    return replace(
        opzo(),
        name="fashion-opzo-fc",
        model=spec(
            mlp, classes=10, hidden=(400, 400), weights="standardized", neuron=spec(LIF, decay=0.5)
        ),
    )
