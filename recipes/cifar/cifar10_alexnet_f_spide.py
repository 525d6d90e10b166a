"""AlexNet-F without norm on CIFAR-10 by SPIDE, IF at T = 30, 250 steps of the backward phase.

Command:  spiketrain write folder --source cifar10 --out data/cifar10 --mode raw
          spiketrain launch recipes/cifar/cifar10_alexnet_f_spide.py --workers 1
Source:   Xiao et al. 2023 (SPIDE), arXiv:2302.00232, and the defaults of its code: batch 128, 100
          epochs, SGD 0.05 with momentum 0.9, times 0.1 after 50 and 75 epochs, 400 steps of
          warm-up, dropout 0.2 on the currents, threshold 1, rest at -1. The published loss is
          multiplied by S = 400 and the learning rate divided by it, which leaves 5e-4 / S of its
          decay. Two differences: weights are drawn from a normal distribution here, and gradients
          of weights have the factor 1 / (1 - 0.2) of a current that is kept and 0 of one that is
          dropped, which the published code leaves out.
Result:   not run (the published accuracies were not available)
"""

from dataclasses import replace

from pipeline.models.feedback import convnet_f
from pipeline.recipe import Recipe, spec
from pipeline.rules.spide import SPIDE
from pipeline.spiking.neuron import IF
from recipes.cifar.cifar10_alexnet_f_ide import recipe as ide

S = 400


def recipe() -> Recipe:
    shared = ide()
    return replace(
        shared,
        name="cifar10-alexnet-f-spide",
        model=spec(
            convnet_f,
            classes=10,
            in_channels=3,
            size=32,
            layers=((96, 3, 2), (256, 3, 1), (384, 3, 2), (384, 3, 1), (256, 3, 1)),
            gain=1.0,
            dropout=0.2,
            dropout_on="currents",
            neuron=spec(IF, threshold=1.0, subtract=2.0),
        ),
        rule=spec(SPIDE, steps=250, scale=S / 128),
        optimizer=shared.optimizer.with_(weight_decay=5e-4 / S),
    )
