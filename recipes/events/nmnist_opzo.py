"""OPZO on N-MNIST: two hidden layers of 800, fully connected.

Command:  spiketrain write events nmnist --source tonic --out data/nmnist --slices 30 --counts int16
          spiketrain launch recipes/events/nmnist_opzo.py --workers 1
Source:   Xiao et al. 2024 (OPZO), arXiv:2407.12516. A fully connected network is published for
          N-MNIST; its sizes, T, and how it is optimised are choices of ours, for neither settings
          nor code are public.
Result:   not run (target, published: 98.27 % top-1; spatial backpropagation 98.15 %, DFA 97.98 %,
zeroth order 72.90 %)"""

from timm.optim import create_optimizer_v2

from pipeline.data.datasets.events import Events
from pipeline.models.mlp import mlp
from pipeline.recipe import Evaluation, Recipe, spec
from pipeline.rules.opzo import OPZO
from pipeline.spiking.neuron import LIF
from pipeline.spiking.surrogate import Sigmoid
from pipeline.train.objective import CrossEntropy
from pipeline.train.schedule import cosine


def recipe() -> Recipe:
    neuron = spec(LIF, decay=0.5, surrogate=Sigmoid(alpha=4.0))
    return Recipe(
        name="nmnist-opzo",
        family="events",
        model=spec(
            mlp,
            classes=10,
            in_features=2 * 34 * 34,
            hidden=(800, 800),
            weights="standardized",
            neuron=neuron,
        ),
        rule=spec(OPZO),
        data=spec(Events, folder="data/nmnist", classes=10, steps=30, size=34),
        objective=spec(CrossEntropy),
        optimizer=spec(create_optimizer_v2, opt="adam", lr=0.001, weight_decay=0.0),
        schedule=spec(cosine),
        time_steps=30,
        batch_size=128,
        epochs=50,
        evaluation=Evaluation(every=10),
    )
