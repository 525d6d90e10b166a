"""SEI-BWSNN's ingredients on MS-ResNet-34: 1-bit weights with a shortcut around each, a teacher, T
= 2, SLTT.

Real are the first and the last synapse, and those in the shortcuts where a stage changes shape.

Command:  spiketrain write folder --source imagenet --out data/imagenet --mode jpg
              --max-resolution 500 --exif ignore
          spiketrain launch recipes/imagenet/ms_resnet34_sei_bw.py --workers 8
Source:   Meng et al. 2025 (SEI-BWSNN), arXiv:2508.12609, only its abstract is public: a
          reconstruction on another network, after Hu et al. 2021 (MS-ResNet), arXiv:2112.08954, SGD
          0.1, 1e-5, batch 256, 125 epochs, and Liu et al. 2020 (ReActNet), arXiv:2003.03488, for
          the two stages, the teacher (a ResNet-34) and its loss.
Result:   not run (nothing like it is published)
Plan:     8 H100, estimated: 2.51, 2.57, 2.24 hours for its three runs, 2.16 GB a card; base.py has
          the command, commit 71e17bd1
"""

from timm.optim import create_optimizer_v2

from pipeline.data.datasets.beton import Beton
from pipeline.models.ms_resnet import ms_resnet
from pipeline.models.teachers.timm import timm_teacher
from pipeline.recipe import Recipe, Suite, spec
from pipeline.rules.sltt import SLTT
from pipeline.train.distillation import Distillation
from pipeline.train.schedule import cosine
from recipes.sei_base import two_stages


def recipe() -> Suite:
    return two_stages(_first_stage(), part="all_but_ends")


def _first_stage() -> Recipe:
    return Recipe(
        name="imagenet-ms-resnet34-sei-fp",
        family="imagenet",
        # Batch norm at each time step, as SLTT asks; published: over T and B together.
        model=spec(ms_resnet, depth=34, classes=1000, shortcut="multiple", over="step"),
        rule=spec(SLTT),
        data=spec(Beton, folder="data/imagenet", classes=1000, size=224, crop="resized"),
        objective=spec(Distillation, label_weight=0.0, form="soft"),
        teacher=spec(timm_teacher, name="resnet34.a1_in1k", precision="bf16"),
        optimizer=spec(
            create_optimizer_v2, opt="momentum", lr=0.1, momentum=0.9, weight_decay=1e-5
        ),
        schedule=spec(cosine),
        time_steps=2,
        batch_size=256,
        epochs=125,
        precision="bf16",
        log_every=50,
    )
