"""Runs whose number of workers (size) changes while they train: invariants, and refusals.

Global batch, learning rate, schedule and steps stay the same. Row r of batch b is the same sample
in the same view at every size, because the order depends on (seed, epoch) alone. So an epoch sees
each sample once at any size. Results differ only by the order of sums, if nothing else depends on
the division of a batch. The parts that could depend on it:

    norms and dropout     depend on the samples of a micro-batch. A micro-batch holds the same rows
                          at every size: at most the largest common share of a worker. Only the
                          number of micro-batches that a worker accumulates changes
    dropout               is drawn from (seed, step, first row of the micro-batch), not from a
                          stream of each rank
    running statistics    are saved as their mean over ranks. All ranks of another size begin with
                          this mean
    a rule's own state    is averaged over ranks by every rule
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from timm.layers.drop import DropPath
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from pipeline.core.checks import require
from pipeline.core.random import counter_hash
from pipeline.core.units import counted
from pipeline.data.mixing import Mixing
from pipeline.recipe.recipe import Recipe, Split
from pipeline.rules.base import Rule
from pipeline.spiking.dropout import Dropout
from pipeline.spiking.norm import BatchNorm, is_foreign_norm
from pipeline.train.part_checks import build_part

_DRAW = 0x656C6173746963  # separates these draws from a rule's
DIVIDED = (BatchNorm, _DropoutNd, Dropout, DropPath)  # they depend on the division of a batch


def format_sizes(sizes: Sequence[int]) -> str:
    """The sizes as a user writes them: 4, 2:4 or 2,4,8."""
    is_range = len(sizes) > 1 and sizes[-1] - sizes[0] == len(sizes) - 1
    return f"{sizes[0]}:{sizes[-1]}" if is_range else ",".join(map(str, sizes))


def fit_to_sizes(recipe: Recipe, network: nn.Module, rule: Rule, sizes: Sequence[int]) -> Recipe:
    """The recipe with micro-batches that hold the same rows at every size, if the network depends
    on the division of a batch.

    Raises:
        ValueError: a size does not divide the global batch, or needs accumulation of a rule that
            moves the weights within a batch, or of a network with statistics over all workers,
            which would then cover more rows at a larger size; or mixing does not take its
            micro-batch; or ZeRO needs one size.
    """
    require(
        len(sizes) == 1 or not recipe.zero,
        f"launch: ZeRO-{recipe.zero} needs one number of workers, for DeepSpeed's checkpoints of it"
        " load on as many only and its universal ones hold Adam alone (0.19.8); got"
        f" {format_sizes(sizes)}; take one number, or zero=0",
    )
    modules, changes = list(network.modules()), len(sizes) > 1
    odd = [size for size in sizes if recipe.batch_size % size]
    fit = [size for size in range(1, sizes[-1] + 1) if recipe.batch_size % size == 0]
    require(
        not (changes and odd),
        f"launch: batch_size={recipe.batch_size} must divide by every number of workers; got"
        f" {format_sizes(sizes)}, with {', '.join(map(str, odd))}; take --workers of"
        f" {format_sizes(fit)}",
    )
    if changes and any(isinstance(each, BatchNorm) and each.between == "world" for each in modules):
        for size in sizes:
            require(
                recipe.split(size).accumulation == 1,
                "launch: BatchNorm(between='world') must see whole global batches where the number"
                f" of workers changes; got micro_batch={recipe.micro_batch}, which is accumulated"
                f" on {counted(size, 'worker')}; take fewer sizes, or between='rank'",
            )
    elif changes and any(isinstance(each, DIVIDED) or is_foreign_norm(each) for each in modules):
        share = math.gcd(*(recipe.batch_size // size for size in sizes))
        sizes_down = range(min(recipe.micro_batch or share, share), 0, -1)
        micro_batch = next(size for size in sizes_down if share % size == 0)
        recipe = replace(recipe, micro_batch=micro_batch)
    for split in map(recipe.split, sizes):
        require(
            rule.update != "step" or split.accumulation == 1,
            f"{recipe.rule.label}: moves the weights at every time step and refuses accumulation;"
            f" got {split}",
        )
        build_mixing(recipe, split)
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
    np.random.seed(seed % 2**32)  # noqa: NPY002  (for a user's own parts)
    torch.manual_seed(seed)


def seed_row(seed: int, *, step: int, row: int) -> None:
    """Seed the global generators for the micro-batch that begins at this row of this batch."""
    seed_everything(counter_hash(_DRAW, seed, step, row) >> 1)
