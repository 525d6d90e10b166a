"""DSR with integrate-and-fire neurons on Fashion-MNIST at T = 10, the network of ann.py.

Command:  spiketrain launch recipes/fashion/dsr_if.py --workers 2
Source:   Meng et al. 2022 (DSR), arXiv:2205.00459; the network is a small one of ours.
Result:   not run
Batch norm gives every neuron currents of unit deviation, of which the threshold of 3 leaves one in a thousand above it; the
published 6 suits T = 20.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.dsr import DSR
from pipeline.spiking.rate import RateIF
from recipes.fashion.ann import recipe as ann


def recipe() -> Recipe:
    shared = ann()
    return replace(
        shared,
        name="fashion-dsr-if",
        model=shared.model.with_(neuron=spec(RateIF, threshold=3.0)),
        rule=spec(DSR),
        time_steps=10,
    )
