"""OPZO on Fashion-MNIST: three convolutions whose errors come from above through matrices learnt
from noise.

OPZO, OPZO+LL, DFA and backpropagation (recipes/fashion/opzo*.py, dfa.py) train this network with
these settings, and form a study; the readouts beside the network are inert for all but OPZO+LL.

Command:  spiketrain launch recipes/fashion/opzo.py --workers 2
Source:   Xiao et al. 2024 (OPZO), arXiv:2407.12516, for the rule, which has no public code; the
          network is a small one of ours.
Result:   top-1 0.9025 (0.9042, 0.9004, 0.9030) on the 10,000 test images after 10 epochs, three
          seeds, each with --inline: one core of an AMD EPYC, under other load, 6 minutes a run;
          commit 15d3b0516162; paired intervals in docs/LOG.md
"""

from dataclasses import replace

from timm.optim import create_optimizer_v2

from pipeline.models.transforms import with_readouts
from pipeline.recipe import Evaluation, Recipe, spec
from pipeline.rules.opzo import OPZO
from pipeline.spiking.neuron import LIF
from recipes.fashion.base import fashion


def recipe() -> Recipe:
    shared = fashion()
    network = shared.model.with_(neuron=spec(LIF, decay=0.5))
    return replace(
        shared,
        name="fashion-opzo",
        model=spec(with_readouts, network=network, classes=10, cells=(7, 7, 3)),
        rule=spec(OPZO),
        optimizer=spec(create_optimizer_v2, opt="adam", lr=0.01, weight_decay=0.0),
        time_steps=2,
        epochs=10,
        evaluation=Evaluation(every=0),
    )
