"""SEI-BWSNN's ingredients on a small MS-ResNet: 1-bit weights but at the ends, a shortcut round each synapse, a teacher, T = 2.

Command:  spiketrain write stamps --out data/stamps-0 --size 160 --split 0 --workers 2
          spiketrain launch recipes/stamps/ms_resnet_sei_fp.py --workers 2 --name stamps-ms-fp
          spiketrain launch recipes/stamps/ms_resnet_sei_bw.py --workers 2 --set init=runs/stamps-ms-fp
Source:   the small twin of recipes/imagenet/ms_resnet34_sei_bw.py, a construction of ours; trained as the small QKFormer.
Result:   not run
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.recipe import Recipe
from recipes.stamps.base import in_one_bit
from recipes.stamps.ms_resnet_sei_fp import recipe as first_stage


def recipe() -> Recipe:
    return replace(in_one_bit(first_stage(), part="all_but_ends"), name="stamps-ms-resnet-sei-bw")
