"""What the continual-learning recipes share: HLOP's fully connected network, plain SGD, and the
tasks made of Fashion-MNIST.
"""

from dataclasses import replace
from typing import Any

from timm.optim import create_optimizer_v2

from pipeline.data.datasets.beton import Beton
from pipeline.data.datasets.tasks import Permuted, SplitClasses
from pipeline.models.mlp import mlp
from pipeline.models.transforms import multi_head
from pipeline.recipe import Phase, Recipe, Spec, spec
from pipeline.rules.hlop import HLOP
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF
from pipeline.spiking.surrogate import Sigmoid
from pipeline.train.objective import CrossEntropy
from pipeline.train.schedule import cosine

# Rows that each task adds to each of the three layers, as published: 20 fewer from every third task
# on, so that ten tasks leave room in 800 inputs. (The published scripts take 20 from one list that
# they keep, and never start it anew.)
ROWS = ((80, 200, 100), *((rows, rows, rows) for rows in (70, 70, 50, 50, 50, 30, 30, 30, 10)))
NEURON = spec(LIF, decay=0.5, surrogate=Sigmoid(4.0))  # published for OTTT and BPTT


def permuted() -> Recipe:
    """Ten tasks: Fashion-MNIST with its pixels in ten orders, one epoch each, one head for all.
    Trained by SLTT.
    """
    return Recipe(
        name="permuted-fashion",
        family="continual",
        model=spec(mlp, classes=10, hidden=(800, 800), bias=False, neuron=NEURON),
        rule=spec(SLTT),
        # No augmentation: it would move pixels that have changed places.
        data=spec(
            Beton,
            folder="data/fashion",
            classes=10,
            channels=1,
            size=28,
            crop="shift",
            reach=0,
            flip="never",
            mean=(0.286,),
            std=(0.353,),
        ),
        objective=spec(CrossEntropy),
        # Published, for MNIST, is 0.1 without momentum, under which too little is learnt in one
        # epoch to be forgotten.
        optimizer=spec(
            create_optimizer_v2, opt="momentum", lr=0.05, momentum=0.9, weight_decay=0.0
        ),
        schedule=spec(cosine),
        time_steps=3,
        batch_size=64,
        epochs=1,
        phases=tuple(
            Phase(name=f"order-{task}", data=spec(Permuted, task=task)) for task in range(10)
        ),
        log_every=50,
    )


def protected(recipe: Recipe, inner: Spec, **changes: Any) -> Recipe:
    """The same tasks by HLOP around `inner`; `changes` are HLOP's keywords."""
    return replace(
        recipe,
        rule=spec(
            HLOP, **{"inner": inner, "rows": ROWS, "learning_rate": (0.001, 0.01, 0.01), **changes}
        ),
    )


def split() -> Recipe:
    """Five tasks of two classes each, a head for each task. Trained by SLTT."""
    return replace(
        permuted(),
        name="split-fashion",
        model=spec(
            multi_head,
            network=spec(mlp, classes=2, hidden=(800, 800), bias=False, neuron=NEURON),
            heads=5,
        ),
        phases=tuple(
            Phase(name=f"pair-{task}", data=spec(SplitClasses, task=task), head=task)
            for task in range(5)
        ),
    )
