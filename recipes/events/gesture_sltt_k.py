"""VGG-11 with batch norm on DVS-Gesture by SLTT-4: four random time steps of twenty are
differentiated.

Command:  spiketrain write events gesture --source tonic --out data/gesture-128 --slices 20
              --frames-by number --counts int16
          spiketrain launch recipes/events/gesture_sltt_k.py --workers 1
Source:   Meng et al. 2023 (SLTT), arXiv:2302.14311, and the defaults of its code: T = 20, 128
          pixels, batch 16, 300 epochs, SGD 0.1 with cosine, weight decay 5e-4, decay 1/11, 5 %
          squared error to the constant target, dropout 0.4 with one mask for all steps. The
          published classifier reads 7 x 7 places, into which the 4 x 4 behind five pools are
          copied; here it reads those 4 x 4.
Result:   not run (target, published for all twenty steps: 97.92 % top-1)
"""

from pipeline.data.datasets.events import Events
from pipeline.recipe import Recipe, spec
from recipes.events.base import sltt_k


def recipe() -> Recipe:
    return sltt_k(
        name="gesture-sltt-4",
        k=4,
        data=spec(Events, folder="data/gesture-128", classes=11, steps=20, size=128),
        goal="ones",
        lr=0.1,
        dropout=0.4,
        batch_size=16,
        grid=4,
    )
