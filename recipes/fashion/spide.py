"""SPIDE on Fashion-MNIST: IDE's network and settings, with the symmetric reset; the backward phase
spikes for 100 steps.

Command:  spiketrain launch recipes/fashion/spide.py --workers 2
Source:   Xiao et al. 2023 (SPIDE), arXiv:2302.00232, for the rule; the network is that of
          recipes/fashion/ide.py with threshold 1 and rest at -1, so that a spike takes 2 as there;
          its settings, and a third of its epochs.
Result:   0.8944 top-1 on the 10,000 test images after 20 epochs, one run with --inline: one core of
          an AMD EPYC, 7 minutes; commit 216e051488a8 (IDE on the same network, spide_ide.py:
          0.8941)
"""

from dataclasses import replace

from pipeline.recipe import Evaluation, Recipe, spec
from pipeline.rules.spide import SPIDE
from pipeline.spiking.neuron import IF
from recipes.fashion.ide import recipe as ide


def recipe() -> Recipe:
    shared = ide()
    return replace(
        shared,
        name="fashion-spide",
        model=shared.model.with_(neuron=spec(IF, threshold=1.0, subtract=2.0)),
        rule=spec(SPIDE, steps=100, scale=2.0),
        epochs=20,
        evaluation=Evaluation(every=0),
    )
