"""QKFormer-10-384 on ImageNet by SLTT-1 at T = 2: one of the two time steps, drawn anew for each
batch, is differentiated.

Command:  spiketrain write folder --source imagenet --out data/imagenet --mode jpg
              --max-resolution 500 --exif ignore
          spiketrain launch recipes/imagenet/qkformer_10_384_sltt_k1.py --workers 8
Source:   Meng et al. 2023 (SLTT-K), arXiv:2302.14311, for the rule; the rest as
          qkformer_10_384_bptt.py, whose study this is.
Result:   not run (no target is published for this rule on this network)
Plan:     8 H100, estimated: 6.5 hours, 8.75 GB a card; base.py has the command, commit 71e17bd1
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.sltt import SLTT
from recipes.imagenet.qkformer_10_384_bptt import recipe as bptt


def recipe() -> Recipe:
    return replace(
        bptt(),
        name="imagenet-qkformer-10-384-sltt-1",
        rule=spec(SLTT, k=1),
        published=(),
        published_setting=(),
    )
