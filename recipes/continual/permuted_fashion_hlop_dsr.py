"""Ten permutations of Fashion-MNIST, one after another, by DSR within the directions that HLOP
leaves free.

Command:  spiketrain launch recipes/continual/permuted_fashion_hlop_dsr.py --workers 2
Source:   Xiao et al. 2024 (HLOP), arXiv:2402.11984: tasks, network, neuron and rows, with
          Fashion-MNIST for MNIST and T = 10 for 20. The rows learn from weighted rates, as
          published: they keep the mean current of old tasks. The optimizer is not the published one
          (base.py says why), and the gradient is that of the rates, not the published code's
          (dsr.py).
Result:   on the 10,000 test images of every task, 2 seeds: ACC 0.8386 (0.8389, 0.8384), BWT -2.54
          points (-2.42, -2.66), last task 0.8529 (0.8512, 0.8547); each with --inline: one core of
          an AMD EPYC, under other load, 19 and 24 minutes; commit 9398500b0cc0
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.dsr import DSR
from pipeline.spiking.rate import RateLIF
from recipes.continual.base import permuted, protected


def recipe() -> Recipe:
    shared = protected(permuted(), spec(DSR), learn_from="rates")
    return replace(
        shared,
        name="permuted-fashion-hlop-dsr",
        model=shared.model.with_(neuron=spec(RateLIF)),
        over_time="mean",
        time_steps=10,
    )
