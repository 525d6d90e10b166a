"""SEI-BWSNN's ingredients on MS-ResNet-34: 1-bit weights but at the ends, a shortcut round each synapse, a teacher, T = 2, SLTT.

Command:  spiketrain write folder --source imagenet --out data/imagenet --mode jpg --max-resolution 500
          spiketrain launch recipes/imagenet/ms_resnet34_sei_fp.py --workers 8 --name ms34-fp
          spiketrain launch recipes/imagenet/ms_resnet34_sei_bw.py --workers 8 --set init=runs/ms34-fp
Source:   Meng et al. 2025 (SEI-BWSNN), arXiv:2508.12609, of which the abstract alone is public: a reconstruction on another
          network, after Hu et al. 2021 (MS-ResNet), arXiv:2112.08954, SGD 0.1, 1e-5, batch 256, 125 epochs, and Liu et al. 2020
          (ReActNet), arXiv:2003.03488, for the two stages, the teacher (a ResNet-34) and its loss.
Result:   not run (nothing like it is published)
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.models.binarized import binarized
from pipeline.recipe import Recipe, spec
from recipes.imagenet.ms_resnet34_sei_fp import recipe as first_stage


def recipe() -> Recipe:
    stage = first_stage()
    return replace(
        stage,
        name="imagenet-ms-resnet34-sei-bw",
        model=spec(binarized, network=stage.model, part="all_but_ends", weights="scaled"),
        optimizer=stage.optimizer.with_(lr=0.05),
    )
