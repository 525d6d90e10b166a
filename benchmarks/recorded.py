"""A rule that writes down which samples it was given, and a recipe of it: what `benchmarks/soak.py`
trains.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence

from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from pipeline.data.datasets.synthetic import Synthetic
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.recipe import Checkpointing, Evaluation, Recipe, spec
from pipeline.rules.base import LossFn, LossTerm
from pipeline.rules.sltt import SLTT
from pipeline.train.objective import CrossEntropy
from pipeline.train.schedule import cosine

SAMPLES, BATCH = 4096, 64


class Recorded(SLTT):
    """SLTT, and a line in the file `into` for each micro-batch: step, rank, and the samples by what
    is in them.
    """

    def __init__(self, into: str, *, pause_s: float = 0.05) -> None:
        super().__init__()
        self.into, self.pause_s = into, pause_s

    def loss_terms(
        self,
        model: nn.Module,
        x_TB: Tensor,
        loss_fn: LossFn,
        *,
        step: int | None = None,
        rows: Sequence[int] | None = None,
    ) -> Iterator[LossTerm]:
        names = [
            hashlib.blake2b(x_B.numpy().tobytes(), digest_size=6).hexdigest() for x_B in x_TB[0]
        ]
        told = {
            "event": "trained",
            "time": time.time(),
            "step": step,
            "rank": self.world.rank,
            "samples": names,
        }
        file = os.open(self.into, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(file, json.dumps(told).encode() + b"\n")  # at once: two ranks write here
        os.close(file)
        time.sleep(self.pause_s)  # as of a larger network
        return super().loss_terms(model, x_TB, loss_fn, step=step, rows=rows)


def recorded(into: str) -> Recipe:
    """An hour or more of small steps, without augmentation, so that a sample is known by its
    pixels.
    """
    return Recipe(
        name="soak",
        model=spec(nf_resnet18_small, classes=10, in_channels=1, width=4, blocks=(1, 1)),
        rule=spec(Recorded, into=into),
        data=spec(Synthetic, samples=SAMPLES, val_samples=64, shape=(1, 16, 16), augment="none"),
        objective=spec(CrossEntropy),
        optimizer=spec(create_optimizer_v2, opt="sgd", lr=0.05, momentum=0.9, weight_decay=1e-4),
        schedule=spec(cosine, warmup=0.0),
        time_steps=2,
        batch_size=BATCH,
        epochs=2000,
        checkpoints=Checkpointing(every=50),
        evaluation=Evaluation(every=4, samples=64),
        log_every=10,
    )
