"""The first stage of ms_resnet_sei_bw.py: the same network, shortcuts and teacher in full precision.

Command:  spiketrain write stamps --out data/stamps-0 --size 160 --split 0 --workers 2
          spiketrain launch recipes/stamps/ms_resnet_sei_fp.py --workers 2 --name stamps-ms-fp
Source:   as ms_resnet_sei_bw.py.
Result:   not run
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.models.ms_resnet import MSResNet
from pipeline.recipe import Recipe, spec
from recipes.stamps.base import CLASSES, sei_first_stage


def recipe() -> Recipe:
    network = spec(MSResNet, blocks=(1, 1, 1, 1), width=16, classes=CLASSES, shortcut="multiple", over="step")
    return replace(sei_first_stage(), name="stamps-ms-resnet-sei-fp", model=network)
