"""The first stage of qkformer_10_768_sei_bw.py: the same network, shortcuts and teacher in full precision.

Command:  spiketrain launch recipes/imagenet/qkformer_10_768_sei_fp.py --workers 8 --name qk768-fp
Source:   as qkformer_10_768_sei_bw.py.
Result:   not run
"""

from __future__ import annotations

from pipeline.recipe import Recipe
from recipes.imagenet.qkformer_base import sei_first_stage


def recipe() -> Recipe:
    return sei_first_stage(768, batch_size=576)
