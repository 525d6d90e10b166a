"""BPTT, SLTT and SLTT-1 on Fashion-MNIST under both protocols: one learning rate for all beside each rule's own best of five.

Command:  spiketrain write fashion --out data/fashion
          spiketrain launch recipes/compare/tuned_fashion.py
Source:   the protocols are ours; the rules are those of Meng et al. 2023 (SLTT), arXiv:2302.14311; the network is one of ours.
Result:   not run yet.

The setting is that of claims_fashion.py at leak 1/11, where all rules share a rate of 0.3, which the rescaled gradient of SLTT-1
bears. That may do BPTT an injustice; here each rule chooses for itself, on a grid of factors of two, which has no 0.3. Trials
train on nine tenths of the training set and are judged by the last; the test set is read once, after the last epoch of the runs
that count.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.protocol import over_seeds, tuned
from pipeline.recipe import spec
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.suite import Suite
from recipes.fashion.base import fashion

RULES = {"bptt": spec(BPTT), "sltt": spec(SLTT), "sltt-1": spec(SLTT, k=1, rescale=True)}
RATES = (0.1, 0.2, 0.4, 0.8, 1.6)
SEEDS = 3


def recipe() -> Suite:
    base = fashion()
    shared = replace(base, optimizer=base.optimizer.with_(lr=0.3), time_steps=6, batch_size=256, epochs=3)
    rules = Suite(tuple(replace(shared, name=f"rates-{name}", rule=rule) for name, rule in RULES.items()))
    return tuned(over_seeds(rules, SEEDS), "optimizer.lr", RATES)
