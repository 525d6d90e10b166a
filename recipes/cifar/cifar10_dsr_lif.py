"""PreAct-ResNet-18 on CIFAR-10 by DSR, leaky neurons at T = 20.

Command:  spiketrain write folder --source cifar10 --out data/cifar10 --mode raw
          spiketrain launch recipes/cifar/cifar10_dsr_lif.py --workers 1
Source:   Meng et al. 2022 (DSR), arXiv:2205.00459: T = 20, batch 128, 200 epochs, SGD 0.1 with
          cosine after 400 steps of warm-up, weight decay 5e-4, on thresholds too, threshold 0.3,
          tau 1, dt 0.05, alpha 0.3. The backward is the published code's, which is not the exact
          gradient of the weighted rates (`rule.backward=rates`), as said in pipeline/rules/dsr.py.
Result:   not run (target, published: 95.40 % top-1)
"""

from dataclasses import replace

from pipeline.models.preact_resnet import preact_resnet18_small
from pipeline.recipe import Recipe, spec
from pipeline.rules.dsr import DSR
from pipeline.spiking.rate import RateLIF
from pipeline.train.objective import CrossEntropy
from pipeline.train.schedule import cosine
from recipes.cifar.base import cifar

EPOCHS, BATCH, SAMPLES, WARMUP_STEPS = 200, 128, 50_000, 400


def recipe() -> Recipe:
    shared = cifar(10)
    return replace(
        shared,
        name="cifar10-dsr-lif",
        model=spec(preact_resnet18_small, classes=10, neuron=spec(RateLIF)),
        rule=spec(DSR, backward="published"),
        objective=spec(CrossEntropy),
        # The published optimizer decays everything, and thresholds come down by it.
        optimizer=shared.optimizer.with_(lr=0.1, weight_decay=5e-4, filter_bias_and_bn=False),
        schedule=spec(
            cosine, warmup=WARMUP_STEPS / (EPOCHS * (SAMPLES // BATCH)), update_every="epoch"
        ),
        time_steps=20,
        over_time="mean",
        batch_size=BATCH,
        epochs=EPOCHS,
    )
