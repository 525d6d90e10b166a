"""Is what membranes carry over noise? The time steps of a trained network as an ensemble, under four carry-overs.

    real        the network as it is
    zero        n[t] = 0: every step is the first
    shuffled    n[t] of another sample: the same noise, but it knows nothing of this sample
    gaussian    n[t] drawn with the mean and variance of its channel and step: nothing but these two is left of it

Where the reading of `spiking/carryover.py` is the whole truth, the last two do as well as the first. The moments come from
training samples. A network is causal in time, so its first T steps are what it does in T steps: one run answers for every T.
"""

# T time, B batch, N samples, K classes

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.base import Batch, Data
from pipeline.evaluate import hits
from pipeline.rules.base import counter_hash
from pipeline.spiking.carryover import CarryOver, Gaussian, record, replaying
from pipeline.spiking.encode import over_steps
from pipeline.spiking.rate import WeightedRates
from pipeline.spiking.state import fresh_state

Kind = Literal["real", "zero", "shuffled", "gaussian"]
KINDS: tuple[Kind, ...] = get_args(Kind)
EXAMPLES = 512  # training samples that moments are taken of


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Over samples, and its standard error, as if each were drawn by itself."""

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
    examples: int
    """training samples that the moments of "gaussian" were taken of"""
    same_class: float
    """share of samples whose donor in "shuffled" is of their class"""
    bytes: int
    """most that the carry-over of one batch took"""
    ensembles: tuple[Ensemble, ...]


@torch.no_grad()
def causal_test(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    examples: Iterable[Tensor],
    *,
    steps: Sequence[int] = (1, 2, 4, 8),
    seed: int = 0,
) -> CausalTest:
    """Run a network over a set, in evaluation, under every carry-over.

    Args:
        batches: (x_TB, target_B, index_B) of at least max(`steps`) time steps; the donor of a sample is half a batch away.
        examples: x_TB of training samples, as many steps.
        steps: the T to answer for.
        seed: of the Gaussian draws, which are functions of (seed, index of the sample, neuron, t).

    Raises: ValueError for T that are none, a batch of one sample, or a network whose steps are not the same for every T.
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
    samples, kin, most_bytes = 0, 0, 0
    with _evaluated(network):
        gaussian = Gaussian(record(network, x_TB[: steps[-1]])[1] for x_TB in examples)
        for x_TB, target_B, index_B in batches:
            if len(target_B) < 2 or len(x_TB) < steps[-1]:
                raise ValueError(
                    f"causal test: a batch needs 2 samples and {steps[-1]} steps; got {len(target_B)} and {len(x_TB)}"
                )
            x_TB = x_TB[: steps[-1]]
            logits_TBK, real = record(network, x_TB)
            donors_B = torch.arange(len(target_B), device=target_B.device).roll(len(target_B) // 2)
            keys_of = lambda place, t, rows=index_B.tolist(): [counter_hash(seed, row, place, t) for row in rows]
            others: dict[Kind, CarryOver] = {
                "zero": real.zero(),
                "shuffled": real.of_others(donors_B),
                "gaussian": gaussian.like(real, keys_of),
            }
            for kind in KINDS:
                if kind != "real":
                    with replaying(network, others[kind]), fresh_state(network):
                        logits_TBK = network(x_TB)
                for T in steps:
                    scores[T, kind].append(_Scores.of(logits_TBK[:T].float(), target_B))
            samples += len(target_B)
            kin += int((target_B[donors_B] == target_B).sum())
            most_bytes = max(most_bytes, real.bytes)
    if not samples:
        raise ValueError("causal test: needs at least one batch; got none")
    whole = {key: _Scores.joined(parts) for key, parts in scores.items()}
    return CausalTest(
        samples=samples,
        examples=gaussian.samples,
        same_class=kin / samples,
        bytes=most_bytes,
        ensembles=tuple(_ensemble(T, kind, whole[T, kind], whole[T, "real"]) for T in steps for kind in KINDS),
    )


def from_both_halves(
    data: Data, micro_batch: int, time_steps: int, device: torch.device
) -> Generator[tuple[Tensor, Tensor, Tensor]]:
    """The evaluation set, each sample once, half of each batch from either half of the file.

    Sets are often stored class by class; half a batch away is then another class. Close it if you leave early.
    """
    with ExitStack() as stack:
        streams = []
        for rank in (0, 1):
            loader = stack.enter_context(closing(data.val(rank=rank, world=2, micro_batch=max(1, micro_batch // 2), threads=1)))
            streams.append(stack.enter_context(loader.epoch(0)))
        for batch in _two_or_more(itertools.zip_longest(*streams)):
            yield over_steps(batch.x.to(device), time_steps), batch.target.to(device), batch.index


def training_examples(data: Data, micro_batch: int, time_steps: int, device: torch.device, *, seed: int) -> Generator[Tensor]:
    """`EXAMPLES` training samples or a few more (or all), augmented as in training. Close it if you leave early."""
    sizes = {"batch_size": micro_batch, "micro_batch": micro_batch}
    with closing(data.train(seed=seed, rank=0, world=1, threads=1, **sizes)) as loader, loader.epoch(0) as batches:
        for batch in itertools.islice(batches, -(-EXAMPLES // micro_batch)):
            yield over_steps(batch.x.to(device), time_steps)


def _two_or_more(pairs: Iterable[tuple[Batch | None, ...]]) -> Iterator[Batch]:
    """Each pair as one batch; a last one of a single sample goes with the one before."""
    waiting: list[Batch] = []
    for pair in pairs:
        now = [batch for batch in pair if batch is not None]
        if waiting and sum(len(batch.target) for batch in now) > 1:
            yield _joined(waiting)
            waiting = []
        waiting += now
    if waiting:
        yield _joined(waiting)


def _joined(batches: Sequence[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in ("x", "target", "index")))


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


def _ensemble(steps: int, kind: Kind, scores: _Scores, real: _Scores) -> Ensemble:
    single_N = scores.hits_TN.mean(0)
    return Ensemble(
        steps=steps,
        carry_over=kind,
        by_step=tuple(scores.hits_TN.mean(1).tolist()),
        single=_mean(single_N),
        ensemble=_mean(scores.hit_N),
        gap=_mean(scores.hit_N - single_N),
        disagreement=_mean(scores.disagreement_N),
        below_real=_mean(real.hit_N - scores.hit_N),
        single_loss=_mean(scores.single_loss_N),
        ensemble_loss=_mean(scores.ensemble_loss_N),
    )


def _mean(values_N: Tensor) -> Mean:
    return Mean(value=float(values_N.mean()), error=float(values_N.std() / len(values_N) ** 0.5))


@contextmanager
def _evaluated(network: nn.Module) -> Iterator[None]:
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
