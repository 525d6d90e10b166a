"""The ANN of the rate-coded study: the network of dsr_if.py and dsr_lif.py with ReLU, for which one
time step is enough.

Command:  spiketrain launch recipes/fashion/ann.py --workers 2
Source:   the network is a small one of ours, ended by rates as in Meng et al. 2022 (DSR),
          arXiv:2205.00459.
Result:   0.9174 top-1 on the 10,000 test images after 8 epochs, one run with --inline: one core of
          an AMD EPYC, under other load, 2 minutes; commit 1c241ec47596
"""

from dataclasses import replace

from torch import nn

from pipeline.models.convnet import convnet
from pipeline.recipe import Evaluation, Recipe, spec
from pipeline.rules.bptt import BPTT
from recipes.fashion.base import fashion


def recipe() -> Recipe:
    shared = fashion()
    return replace(
        shared,
        name="fashion-ann",
        model=spec(
            convnet,
            classes=10,
            in_channels=1,
            stages=((32,), (64,), (128,)),
            stem_stride=2,
            grid=3,
            over="time",
            head="rate",
            neuron=spec(nn.ReLU),
        ),
        rule=spec(BPTT),
        # Everything decays, as DSR has it: thresholds come down by it.
        optimizer=shared.optimizer.with_(lr=0.1, weight_decay=5e-4, filter_bias_and_bn=False),
        time_steps=1,
        over_time="mean",
        epochs=8,
        evaluation=Evaluation(every=0),
    )
