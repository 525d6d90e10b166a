"""SEI-BWSNN's ingredients on a small MS-ResNet: 1-bit weights with a shortcut around each, a
teacher, T = 2, SLTT.

Command:  spiketrain write stamps --out data/stamps-0 --size 160 --split 0 --workers 2
          spiketrain launch recipes/stamps/ms_resnet_sei_bw.py --workers 2
Source:   the small twin of recipes/imagenet/ms_resnet34_sei_bw.py, a construction of ours; trained
          as the small QKFormer.
Result:   on unseen objects of split 0, one seed: full precision .1923; 1-bit, from there, by SLTT
          .2269 (16 min), by BPTT .2202 (16 min); 377 and 403 MB kept for backward; the teacher's
          probe .593; --inline --device cpu; commits 4d844037c16b (the first) and 62b984f766d4, one
          thread of 2 cores of an AMD EPYC, under other load, torch 2.13
"""

from dataclasses import replace

from pipeline.models.ms_resnet import MSResNet
from pipeline.recipe import Suite, spec
from recipes.sei_base import two_stages
from recipes.stamps.base import CLASSES, sei_first_stage


def recipe() -> Suite:
    network = spec(
        MSResNet, blocks=(1, 1, 1, 1), width=16, classes=CLASSES, shortcut="multiple", over="step"
    )
    return two_stages(
        replace(sei_first_stage(), name="stamps-ms-resnet-sei-fp", model=network),
        part="all_but_ends",
    )
