"""OPZO with local readouts, and one in the middle whose errors go to all layers below, on
DVS-Gesture.

Command:  spiketrain write events gesture --source tonic --out data/gesture --slices 20 --size 48
              --counts int16
          spiketrain launch recipes/events/gesture_opzo_ll.py --workers 1
Source:   Xiao et al. 2024 (OPZO+LL+IGL, 9 layers), arXiv:2407.12516; its settings and code are not
          public. Network, T = 20, batch 16, 300 epochs, Adam 1e-3 with cosine and 0.1 % squared
          error are those that OTTT publishes for this set (Xiao et al. 2022, arXiv:2210.04195);
          where the readouts stand is a choice of ours.
Result:   not run (target, published: 96.88 % top-1; spatial backpropagation 94.10 %)
"""

from timm.optim import create_optimizer_v2

from pipeline.data.datasets.events import Events
from pipeline.models.transforms import with_readouts
from pipeline.models.vgg import vgg_sws
from pipeline.recipe import Evaluation, Recipe, spec
from pipeline.rules.opzo import OPZO
from pipeline.spiking.neuron import LIF
from pipeline.spiking.surrogate import Sigmoid
from pipeline.train.objective import CrossEntropy
from pipeline.train.schedule import cosine


def recipe() -> Recipe:
    network = spec(
        vgg_sws,
        classes=11,
        in_channels=2,
        neuron=spec(LIF, decay=0.5, surrogate=Sigmoid(alpha=4.0)),
    )
    return Recipe(
        name="gesture-opzo-ll",
        family="events",
        model=spec(with_readouts, network=network, classes=11, cells=3),
        rule=spec(OPZO, local_readouts=True, intermediate=(3,)),
        data=spec(Events, folder="data/gesture", classes=11, steps=20, size=48),
        objective=spec(CrossEntropy, mse=0.001, goal="one_hot"),
        optimizer=spec(create_optimizer_v2, opt="adam", lr=0.001, weight_decay=0.0),
        schedule=spec(cosine),
        time_steps=20,
        batch_size=16,
        epochs=300,
        evaluation=Evaluation(every=10),
    )
