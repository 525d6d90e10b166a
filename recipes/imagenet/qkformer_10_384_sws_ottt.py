"""QKFormer-10-384 without batch norm, with a shortcut around every synapse of its FFN, on ImageNet
by OTTT-A at T = 6.

Command:  spiketrain write folder --source imagenet --out data/imagenet --mode jpg
              --max-resolution 500 --exif ignore
          spiketrain launch recipes/imagenet/qkformer_10_384_sws_ottt.py --workers 8
Source:   a construction of ours: Xiao et al. 2022 (OTTT), arXiv:2210.04195, for the rule and T; the
          network of Zhou et al. 2024 (QKFormer), arXiv:2403.16552, with the standardised weights of
          Brock et al. 2021, arXiv:2101.08692, for batch norm.
Result:   not run (nothing like it is published)
Plan:     8 H100, estimated: 36.4 hours, 9.81 GB a card; base.py has the command, commit 71e17bd1
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.ottt import OTTT
from recipes.imagenet.qkformer_base import qkformer


def recipe() -> Recipe:
    recipe = qkformer(384, batch_size=512)
    return replace(
        recipe,
        name="imagenet-qkformer-10-384-sws-ottt",
        model=recipe.model.with_(shortcut="multiple", norm="sws"),
        rule=spec(OTTT),
        time_steps=6,
    )
