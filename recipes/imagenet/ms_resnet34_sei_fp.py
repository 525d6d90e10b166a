"""The first stage of ms_resnet34_sei_bw.py: the same network, shortcuts and teacher in full precision.

Command:  spiketrain launch recipes/imagenet/ms_resnet34_sei_fp.py --workers 8 --name ms34-fp
Source:   as ms_resnet34_sei_bw.py.
Result:   not run
"""

from __future__ import annotations

from timm.optim import create_optimizer_v2

from pipeline.data.beton import Beton
from pipeline.distill import Distillation
from pipeline.models.ms_resnet import ms_resnet
from pipeline.recipe import Recipe, spec
from pipeline.rules.sltt import SLTT
from pipeline.schedule import cosine
from pipeline.teachers.timm import timm_teacher


def recipe() -> Recipe:
    return Recipe(
        name="imagenet-ms-resnet34-sei-fp",
        # Batch norm at each time step, as SLTT asks; published: over T and B together.
        model=spec(ms_resnet, depth=34, classes=1000, shortcut="multiple", over="step"),
        rule=spec(SLTT),
        data=spec(Beton, folder="data/imagenet", classes=1000, size=224, crop="resized"),
        objective=spec(Distillation, label_weight=0.0, form="soft"),
        teacher=spec(timm_teacher, name="resnet34.a1_in1k", precision="bf16"),
        optimizer=spec(create_optimizer_v2, opt="momentum", lr=0.1, momentum=0.9, weight_decay=1e-5),
        schedule=spec(cosine),
        time_steps=2,
        batch_size=256,
        epochs=125,
        precision="bf16",
        log_every=50,
    )
