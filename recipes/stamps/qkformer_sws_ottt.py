"""A small QKFormer without batch norm, with a shortcut around every synapse of its FFN, on stamps
by OTTT-A at T = 6.

Command:  spiketrain write stamps --out data/stamps-0 --size 160 --split 0 --workers 2
          spiketrain launch recipes/stamps/qkformer_sws_ottt.py --workers 2
Source:   the small twin of recipes/imagenet/qkformer_10_384_sws_ottt.py, a construction of ours.
Result:   .2327 on unseen objects of split 0, one seed; 28 min, 52 MB kept for backward; with
          --inline --device cpu; commit 4d844037c16b, one thread of 2 cores of an AMD EPYC, under
          other load, torch 2.13
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.ottt import OTTT
from recipes.stamps.base import qkformer


def recipe() -> Recipe:
    recipe = qkformer()
    network = recipe.model.with_(shortcut="multiple", norm="sws")
    return replace(
        recipe, name="stamps-qkformer-sws-ottt", model=network, rule=spec(OTTT), time_steps=6
    )
