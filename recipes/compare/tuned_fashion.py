"""BPTT, SLTT and SLTT-1 on Fashion-MNIST under both protocols: one learning rate for all, and each
rule's own best of five.

Command:  spiketrain write fashion --out data/fashion
          spiketrain launch recipes/compare/tuned_fashion.py
Source:   the protocols are ours; the rules are those of Meng et al. 2023 (SLTT), arXiv:2302.14311;
          the network is one of ours.
Result:   no rule is shown to gain by its own rate: BPTT .8888 shared, .8867 tuned; SLTT .8876,
          .8723; SLTT-1 .8876, .8914; 33 runs, commit 8600a6e99241, AMD EPYC. Table: docs/LOG.md,
          "Results that stood in the docstrings of recipes".

The setting is that of claims_fashion.py at decay 1/11, whose newest launch has later figures of the
shared rate. Trials train on nine tenths of the training set and are judged by the remaining tenth.
The test set is read once, after the last epoch.
"""

from dataclasses import replace

from pipeline.recipe import Suite, spec
from pipeline.recipe.search import over_seeds, with_tuning
from pipeline.report.suite import print_protocols
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from recipes.fashion.base import fashion

RULES = {"bptt": spec(BPTT), "sltt": spec(SLTT), "sltt-1": spec(SLTT, k=1, rescale=True)}
RATES = (0.1, 0.2, 0.4, 0.8, 1.6)
SEEDS = 3


def recipe() -> Suite:
    base = fashion()
    shared = replace(
        base, optimizer=base.optimizer.with_(lr=0.3), time_steps=6, batch_size=256, epochs=3
    )
    rules = Suite(
        tuple(replace(shared, name=f"rates-{name}", rule=rule) for name, rule in RULES.items())
    )
    return with_tuning(over_seeds(rules, SEEDS), "optimizer.lr", RATES, report=print_protocols)
