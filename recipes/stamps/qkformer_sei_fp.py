"""The first stage of qkformer_sei_bw.py: the same network, shortcuts and teacher in full precision.

Command:  spiketrain write stamps --out data/stamps-0 --size 160 --split 0 --workers 2
          spiketrain launch recipes/stamps/qkformer_sei_fp.py --workers 2 --name stamps-fp
Source:   as qkformer_sei_bw.py.
Result:   not run
"""

from __future__ import annotations

from pipeline.recipe import Recipe
from recipes.stamps.base import sei_first_stage


def recipe() -> Recipe:
    return sei_first_stage()
