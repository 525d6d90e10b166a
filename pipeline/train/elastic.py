"""Elastic runs, whose number of workers (size) may change during training: what stays the same, and
what is refused.

Global batch, learning rate, schedule and steps stay the same. Row r of batch b is the same sample
in the same view at every size, because the order depends on (seed, epoch) alone. So an epoch has
the same samples at any size. Weights differ only by the order of sums. Some parts of a network
depend on how a batch is divided:

    norms and dropout     depend on the samples of a micro-batch. A micro-batch has the same rows at
                          every size. Only the number of micro-batches that a worker accumulates
                          changes
    dropout               is drawn from (seed, step, first row of the micro-batch), as in every run
    running statistics    are updated by each micro-batch, so they depend on the size. Their mean
                          over ranks is saved, too. An attempt with another size starts with it
    a rule's own state    is averaged over ranks by every rule
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from timm.layers.drop import DropPath
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from pipeline.core.checks import require
from pipeline.core.random import counter_hash
from pipeline.core.torch_settings import seed_torch
from pipeline.core.units import counted
from pipeline.data.mixing import Mixing
from pipeline.recipe.recipe import Recipe, Split
from pipeline.rules.base import Rule
from pipeline.spiking.dropout import Dropout
from pipeline.spiking.norm import BatchNorm, is_foreign_norm
from pipeline.train.part_checks import build_part

_STREAM = 0x656C6173746963  # separates these random numbers from a rule's
_MICRO_BATCH_DEPENDENT = (BatchNorm, _DropoutNd, Dropout, DropPath)


def format_sizes(sizes: Sequence[int]) -> str:
    """The sizes as a user writes them: 4, 2:4 or 2,4,8."""
    is_range = len(sizes) > 1 and sizes[-1] - sizes[0] == len(sizes) - 1
    return f"{sizes[0]}:{sizes[-1]}" if is_range else ",".join(map(str, sizes))


def fit_to_sizes(recipe: Recipe, network: nn.Module, rule: Rule, sizes: Sequence[int]) -> Recipe:
    """Check that a recipe can train at each of `sizes`. Returns the recipe. If there are several
    sizes and the network depends on the micro-batch, the returned recipe has one `micro_batch` that
    fits every size.

    Raises:
        ValueError: one of these:
            - a size does not divide the global batch
            - a rule that moves the weights within a batch needs accumulation at a size
            - mixing does not accept the micro-batch of a size
            - with several sizes: the recipe uses ZeRO
            - with several sizes: batch norm over all workers needs accumulation at a size
    """
    is_elastic = len(sizes) > 1
    require(
        not (is_elastic and recipe.zero),
        f"launch: ZeRO-{recipe.zero} needs one number of workers; got {format_sizes(sizes)}; take"
        " one number, or zero=0 (DeepSpeed 0.19.8 loads ZeRO checkpoints only on the same number,"
        " and its universal checkpoints support only Adam)",
    )
    unfit_sizes = [size for size in sizes if recipe.batch_size % size]
    fit_sizes = [size for size in range(1, sizes[-1] + 1) if recipe.batch_size % size == 0]
    require(
        not (is_elastic and unfit_sizes),
        f"launch: every number of workers must divide batch_size={recipe.batch_size}; got"
        f" {format_sizes(sizes)}, with {', '.join(map(str, unfit_sizes))}; take --workers of"
        f" {format_sizes(fit_sizes)}",
    )
    modules = list(network.modules()) if is_elastic else []
    world_norms = [
        each for each in modules if isinstance(each, BatchNorm) and each.between == "world"
    ]
    if any(
        (isinstance(each, _MICRO_BATCH_DEPENDENT) or is_foreign_norm(each))
        and each not in world_norms
        for each in modules
    ):
        max_rows = math.gcd(*(recipe.batch_size // size for size in sizes))
        candidates = range(min(recipe.micro_batch or max_rows, max_rows), 0, -1)
        micro_batch = next(rows for rows in candidates if max_rows % rows == 0)
        recipe = replace(recipe, micro_batch=micro_batch)
    for size in sizes:
        require(
            not world_norms or recipe.split(size).accumulation == 1,
            "launch: BatchNorm(between='world') needs whole global batches if the number of"
            f" workers may change; got micro_batch={recipe.micro_batch}, which is accumulated"
            f" on {counted(size, 'worker')} (dropout and other norms need one micro_batch for all"
            " sizes); take one number of workers, or between='rank'",
        )
    for split in map(recipe.split, sizes):
        require(
            rule.update != "step" or split.accumulation == 1,
            f"{recipe.rule.label}: moves the weights at every time step, so a batch must not be"
            f" accumulated; got {split}",
        )
        build_mixing(recipe, split)  # for its checks
    return recipe


def build_mixing(recipe: Recipe, split: Split) -> Mixing | None:
    if recipe.mixing is None:
        return None
    mixing = build_part("mixing", recipe.mixing, Mixing)
    mixing.check(micro_batch=split.micro_batch)
    return mixing


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (a user's own parts may use it)
    seed_torch(seed)


def seed_micro_batch(seed: int, *, step: int, first_row: int) -> None:
    """Seed the global generators for the micro-batch of batch `step` that begins at `first_row`."""
    seed_everything(counter_hash(_STREAM, seed, step, first_row) >> 1)
