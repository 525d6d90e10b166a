"""Is what membranes carry over noise? The time steps of a trained network as an ensemble, under four carry-overs.

    real        the network as it is
    zero        n[t] = 0: every step is the first
    shuffled    n[t] of another sample: the same noise, but it knows nothing of this sample
    gaussian    n[t] drawn with the mean and variance of its channel and step: nothing but these two is left of it

Where the reading of `spiking/carryover.py` is the whole truth, the last two do as well as the first. A network is causal in
time, so its first T steps are what it does in T steps: one run answers for every T.

Donors come from the whole evaluation set in an order drawn at random, each the next one's: that a donor is of some class says
nothing of its sample, however the file is laid out. Donors that must be of another class would say what the class is not.

The moments are those of the evaluation set itself: a network that has fitted its training samples may carry over other amounts
on them, and a shift of moments would then be read as structure that is lost.
"""

# T time, B batch, N samples, G groups of samples, K classes

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.base import Batch, Data, Loader
from pipeline.evaluate import hits
from pipeline.random import DONOR, bits, counter_hash
from pipeline.spiking.carryover import CarryOver, Gaussian, record, replaying
from pipeline.spiking.encode import over_steps
from pipeline.spiking.rate import WeightedRates
from pipeline.spiking.state import fresh_state

Kind = Literal["real", "zero", "shuffled", "gaussian"]
KINDS: tuple[Kind, ...] = get_args(Kind)
HELD_BYTES = 2**31  # of evaluation samples, that the host's memory holds at once


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Over samples, and its standard error: as if each were drawn by itself, or each group of them."""

    value: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """T steps under one carry-over. Shares in 0..1; losses are cross-entropies with the labels, in nats."""

    steps: int
    carry_over: Kind
    by_step: tuple[float, ...]
    """top-1 of each step by itself"""
    single: Mean
    """top-1 of a step, the mean over steps"""
    ensemble: Mean
    """top-1 of the mean of the logits"""
    gap: Mean
    """ensemble - single, sample by sample"""
    disagreement: Mean
    """share of the pairs of steps that predict different classes; 0 where there is one step"""
    below_real: Mean
    """top-1 of the ensemble with the real carry-over minus this one's, sample by sample"""
    single_loss: Mean
    ensemble_loss: Mean


@dataclass(frozen=True, kw_only=True)
class CausalTest:
    """The test on one network: an `Ensemble` for every T and carry-over."""

    samples: int
    groups: int
    """that standard errors are over: as many as samples, where each is drawn by itself"""
    same_class: float
    """share of samples whose donor in "shuffled" is of their class"""
    bytes: int
    """most that the carry-over of one batch took"""
    ensembles: tuple[Ensemble, ...]


@torch.no_grad()
def causal_test(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    steps: Sequence[int] = (1, 2, 4, 8),
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> CausalTest:
    """Run a network over a set, in evaluation, under every carry-over.

    Args:
        batches: (x_TB, target_B, index_B) of at least max(`steps`) time steps, such as `Shuffled`. The donor of a sample is the
            one behind it, so the last of a batch is there as a donor alone. Gone through twice, first for the moments.
        steps: the T to answer for.
        groups: what each sample belongs with, at its index; standard errors are then over groups, whatever samples of one have
            in common. None: each sample is drawn by itself.
        seed: of the Gaussian draws, which are functions of (seed, index of the sample, neuron, t).

    Raises: ValueError for T that are none, a batch of one sample, a sample that is its own donor, batches that are others the
    second time, groups that are fewer than 2, or a network whose steps are not the same for every T.
    Source: Liang & Zeger 1986 (doi 10.1093/biomet/73.1.13) for errors over groups, here with the factor G / (G - 1).
    """
    steps = sorted(set(steps))
    if not steps or steps[0] < 1:
        raise ValueError(f"causal test: steps must be numbers of time steps, from 1; got {steps}")
    weighted = next((name for name, module in network.named_modules() if isinstance(module, WeightedRates)), None)
    if weighted is not None:
        raise ValueError(
            f"causal test: a step must be the same for every T, but WeightedRates counts back from the last; got it at {weighted}"
        )
    scores: dict[tuple[int, Kind], list[_Scores]] = {(T, kind): [] for T in steps for kind in KINDS}
    rows: list[int] = []  # of the file
    again: list[int] = []
    kin, most_bytes = 0, 0

    def examples() -> Iterator[CarryOver]:
        for x_TB, _, index_B in _checked(batches, steps[-1]):
            rows.extend(index_B[:-1].tolist())
            yield record(network, x_TB)[1].changed(lambda name, t, v_B: v_B[:-1])

    with _evaluated(network):
        gaussian = Gaussian(examples())
        group_N = _numbered(rows if groups is None else [groups[row] for row in rows])
        for x_TB, target_B, index_B in _checked(batches, steps[-1]):
            logits_TBK, real = record(network, x_TB)
            donors_B = torch.arange(len(target_B), device=target_B.device).roll(-1)
            keys_of = lambda place, t, rows=index_B.tolist(): [counter_hash(seed, row, place, t) for row in rows]
            others: dict[Kind, CarryOver] = {
                "zero": real.zero(),
                "shuffled": real.of_others(donors_B),
                "gaussian": gaussian.like(real, keys_of),
            }
            for kind in KINDS:
                if kind != "real":
                    # The last sample runs too: batches of one size, so that not even the order of additions differs.
                    with replaying(network, others[kind]), fresh_state(network):
                        logits_TBK = network(x_TB)
                for T in steps:
                    scores[T, kind].append(_Scores.of(logits_TBK[:T, :-1].float(), target_B[:-1]))
            again += index_B[:-1].tolist()
            kin += int((target_B[:-1] == target_B[1:]).sum())
            most_bytes = max(most_bytes, real.bytes)
    if again != rows:
        raise ValueError(
            "causal test: batches must be the same each time they are gone through; "
            f"got {len(rows)} samples, then {len(again)}{' others' * (len(again) == len(rows))}"
        )
    whole = {key: _Scores.joined(parts) for key, parts in scores.items()}
    return CausalTest(
        samples=len(rows),
        groups=int(group_N.max()) + 1,
        same_class=kin / len(rows),
        bytes=most_bytes,
        ensembles=tuple(_ensemble(T, kind, whole[T, kind], whole[T, "real"], group_N) for T in steps for kind in KINDS),
    )


@dataclass(frozen=True, kw_only=True)
class Shuffled:
    """The evaluation set of `data`, each sample once, in an order that is a function of `seed` and the set's size.

    A batch is up to `micro_batch` samples (2 or more) x_TB `[time_steps, B, ...]`, target_B, index_B, the last of them there as
    a donor alone: it begins the next batch, or began the first.

    Loaders read a file from its beginning, so samples wait in the host's memory, `held_bytes` of them. A set that is larger is
    read once for each part; parts are drawn at random too, and a sample's donor is of its own part.
    """

    data: Data
    micro_batch: int
    time_steps: int
    device: torch.device
    seed: int
    held_bytes: int = HELD_BYTES

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        with self._loader() as loader:
            samples = loader.samples
        order_N = np.argsort(bits(self.seed, 0, np.arange(samples), DONOR), kind="stable")
        in_part = max(1, self.held_bytes // (4 * math.prod(self.data.shape)))
        parts = max(1, min(-(-samples // in_part), samples // 2))  # of 2 samples or more
        for places in np.array_split(order_N, parts):
            held = self._at(places, samples)
            for first in range(0, len(places), self.micro_batch - 1):
                last = min(first + self.micro_batch - 1, len(places))
                rows = torch.arange(first, last + 1) % len(places)
                x_TB = over_steps(held.x[rows].to(self.device), self.time_steps)
                yield x_TB, held.target[rows].to(self.device), held.index[rows]

    def _at(self, places: NDArray[np.int64], samples: int) -> Batch:
        """Samples by their places among all of the evaluation set."""
        row_N = torch.full((samples,), -1)
        row_N[torch.from_numpy(places)] = torch.arange(len(places))
        held = Batch(
            torch.empty(len(places), *self.data.shape),
            torch.empty(len(places), dtype=torch.int64),
            torch.empty(len(places), dtype=torch.int64),
        )
        read = 0
        with self._loader() as loader, loader.epoch(0) as batches:
            for batch in batches:
                row_B = row_N[read : read + len(batch.target)]
                read += len(batch.target)
                wanted_B = row_B >= 0
                for name in ("x", "target", "index"):
                    getattr(held, name)[row_B[wanted_B]] = getattr(batch, name)[wanted_B]
        return held

    def _loader(self) -> closing[Loader]:
        return closing(self.data.val(rank=0, world=1, micro_batch=self.micro_batch, threads=1))


def _checked(batches: Iterable[tuple[Tensor, Tensor, Tensor]], steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of the first `steps` time steps."""
    for x_TB, target_B, index_B in batches:
        if len(target_B) < 2 or len(x_TB) < steps:
            raise ValueError(f"causal test: a batch needs 2 samples and {steps} steps; got {len(target_B)} and {len(x_TB)}")
        if (own := index_B[:-1][index_B[:-1] == index_B[1:]]).numel():
            raise ValueError(f"causal test: a sample's donor must be another sample; got sample {int(own[0])} for itself")
        yield x_TB[:steps], target_B, index_B


def _numbered(names: Sequence[int] | Sequence[str]) -> Tensor:
    """The number, from 0, of each one's group."""
    _, number_N = np.unique(np.asarray(names), return_inverse=True)
    if number_N.max() < 1:
        raise ValueError(f"causal test: samples must be of 2 groups or more; got {len(names)} samples of one")
    return torch.from_numpy(number_N)


@dataclass(frozen=True, eq=False)
class _Scores:
    """Of each sample by itself, in float64."""

    hits_TN: Tensor
    hit_N: Tensor
    disagreement_N: Tensor
    single_loss_N: Tensor
    ensemble_loss_N: Tensor

    @classmethod
    def of(cls, logits_TBK: Tensor, target_B: Tensor) -> _Scores:
        T = len(logits_TBK)
        mean_BK = logits_TBK.mean(0)
        predicted_TB = logits_TBK.argmax(-1)
        differing_B = (predicted_TB[:, None] != predicted_TB[None]).double().sum((0, 1))
        wide_TBK = logits_TBK.double()
        losses_TB = torch.stack([F.cross_entropy(logits_BK, target_B, reduction="none") for logits_BK in wide_TBK])
        return cls(
            torch.stack([hits(logits_BK, target_B)[:, 0] for logits_BK in logits_TBK]).double().cpu(),
            hits(mean_BK, target_B)[:, 0].double().cpu(),
            (differing_B / max(1, T * (T - 1))).cpu(),
            losses_TB.mean(0).cpu(),
            F.cross_entropy(wide_TBK.mean(0), target_B, reduction="none").cpu(),
        )

    @classmethod
    def joined(cls, parts: Sequence[_Scores]) -> _Scores:
        return cls(*(torch.cat([getattr(part, name) for part in parts], -1) for name in cls.__dataclass_fields__))


def _ensemble(steps: int, kind: Kind, scores: _Scores, real: _Scores, group_N: Tensor) -> Ensemble:
    single_N = scores.hits_TN.mean(0)
    return Ensemble(
        steps=steps,
        carry_over=kind,
        by_step=tuple(scores.hits_TN.mean(1).tolist()),
        single=_mean(single_N, group_N),
        ensemble=_mean(scores.hit_N, group_N),
        gap=_mean(scores.hit_N - single_N, group_N),
        disagreement=_mean(scores.disagreement_N, group_N),
        below_real=_mean(real.hit_N - scores.hit_N, group_N),
        single_loss=_mean(scores.single_loss_N, group_N),
        ensemble_loss=_mean(scores.ensemble_loss_N, group_N),
    )


def _mean(values_N: Tensor, group_N: Tensor) -> Mean:
    """Its variance: G / (G - 1) times the sum over groups of (sum of residuals)^2, over N^2.

    Where each sample is a group, std^2 / N.
    """
    N, G = len(values_N), int(group_N.max()) + 1
    mean = values_N.mean()
    residual_G = torch.zeros(G, dtype=values_N.dtype).index_add_(0, group_N, values_N - mean)
    return Mean(value=float(mean), error=float(residual_G.norm() * (G / (G - 1)) ** 0.5 / N))


@contextmanager
def _evaluated(network: nn.Module) -> Iterator[None]:
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
