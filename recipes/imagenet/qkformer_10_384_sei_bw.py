"""SEI-BWSNN on QKFormer-10-384: an FFN of 1-bit weights, a shortcut round each of its synapses, a timm teacher, T = 2, SLTT.

Command:  spiketrain write folder --source imagenet --out data/imagenet --mode jpg --max-resolution 500
          spiketrain launch recipes/imagenet/qkformer_10_384_sei_fp.py --workers 8 --name qk384-fp
          spiketrain launch recipes/imagenet/qkformer_10_384_sei_bw.py --workers 8 --set init=runs/qk384-fp
Source:   Meng et al. 2025 (SEI-BWSNN), arXiv:2508.12609, of which the abstract alone is public. A reconstruction: backbone, place
          of the shortcuts (reading A: the membrane stream), binariser, teacher, stages, settings are ours, after Zhou et al. 2024
          (QKFormer), arXiv:2403.16552, and Liu et al. 2020 (ReActNet), arXiv:2003.03488. Reading B, whole numbers on the
          stream as published for QKFormer: --set model.network.shortcut=sew_multiple in both stages.
Result:   not run (target, none is published for this width)
"""

from __future__ import annotations

from pipeline.recipe import Recipe
from recipes.imagenet.qkformer_base import sei_second_stage


def recipe() -> Recipe:
    return sei_second_stage(384, batch_size=512)
