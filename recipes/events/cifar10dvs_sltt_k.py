r"""VGG-11 with batch norm on CIFAR10-DVS by SLTT-2: two random time steps of ten are
differentiated.

Command:  spiketrain write events cifar10dvs --source tonic --out data/cifar10dvs-10 --slices 10
              --frames-by number \ --size 48 --resize area
          spiketrain launch recipes/events/cifar10dvs_sltt_k.py --workers 1
Source:   Meng et al. 2023 (SLTT), arXiv:2302.14311, and the defaults of its code: T = 10, 48
          pixels, no augmentation, batch 128, 300 epochs, SGD 0.05 with cosine, weight decay 5e-4,
          decay 1/11, 5 % squared error to the one-hot target, the first 90 % of each class train,
          dropout 0.3 with one mask for all steps. The published classifier reads the one place that
          five pools leave, 49 times over; here it reads the global pool behind four.
Result:   not run (target, published for all ten steps: 77.30 % top-1)
"""

from pipeline.data.datasets.events import Events
from pipeline.recipe import Recipe, spec
from recipes.events.base import sltt_k


def recipe() -> Recipe:
    return sltt_k(
        name="cifar10dvs-sltt-2",
        k=2,
        data=spec(Events, folder="data/cifar10dvs-10", classes=10, steps=10, size=48),
        goal="one_hot",
        lr=0.05,
        dropout=0.3,
        batch_size=128,
    )
