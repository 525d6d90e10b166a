"""AlexNet-F on CIFAR-10 by IDE, LIF at T = 30.

Command:  spiketrain write folder --source cifar10 --out data/cifar10 --mode raw
          spiketrain launch recipes/cifar/cifar10_alexnet_f_ide.py --workers 1
Source:   Xiao et al. 2021 (IDE), arXiv:2109.14247: batch 128, 100 epochs, SGD 0.05 with momentum
          0.9, times 0.1 after 50 and 75 epochs, 400 steps of warm-up, weight decay 5e-4, dropout
          0.2 on the currents, threshold 2, decay 0.99.
Result:   not run (target, published: 91.74 % top-1, mean of several runs; IF 91.73 %)
"""

from dataclasses import replace

from pipeline.models.feedback import alexnet_f
from pipeline.recipe import Recipe, spec
from pipeline.rules.ide import IDE
from pipeline.spiking.neuron import LIF
from pipeline.train.objective import CrossEntropy
from pipeline.train.schedule import milestones
from recipes.cifar.base import cifar

WARMUP = 400 / (100 * 390)  # of the steps of 100 epochs


def recipe() -> Recipe:
    shared = cifar(10)
    return replace(
        shared,
        name="cifar10-alexnet-f-ide",
        model=spec(
            alexnet_f,
            classes=10,
            dropout=0.2,
            dropout_on="currents",
            neuron=spec(LIF, decay=0.99, threshold=2.0),
        ),
        rule=spec(IDE),
        objective=spec(CrossEntropy),
        optimizer=shared.optimizer.with_(lr=0.05, weight_decay=5e-4, filter_bias_and_bn=False),
        schedule=spec(milestones, at=(0.5, 0.75), warmup=WARMUP),
        time_steps=30,
        over_time="mean",
        epochs=100,
    )
