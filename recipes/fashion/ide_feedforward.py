"""A feed-forward network with as many parameters as IDE's: 784-400-400-10, 478,410 against 478,011,
trained by BPTT.

Command:  spiketrain launch recipes/fashion/ide_feedforward.py --workers 2
Source:   the neurons and settings of recipes/fashion/ide.py, without its dropout.
Result:   0.8928 top-1 on the 10,000 test images after 60 epochs, one run with --inline: one core of
          an AMD EPYC, 8 minutes; commit 216e051488a8 (IDE with as many parameters, ide.py: 0.9019)
"""

from dataclasses import replace

from pipeline.models.mlp import mlp
from pipeline.recipe import Recipe, spec
from pipeline.rules.bptt import BPTT
from pipeline.spiking.neuron import IF
from recipes.fashion.ide import recipe as ide


def recipe() -> Recipe:
    return replace(
        ide(),
        name="fashion-ide-feedforward",
        model=spec(
            mlp, classes=10, in_features=784, hidden=(400, 400), neuron=spec(IF, threshold=2.0)
        ),
        rule=spec(BPTT),
    )
