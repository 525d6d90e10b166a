"""Exact evaluation over ranks: sums are reduced, nothing is padded, no sample counts twice.

T time, B batch, K classes
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

from pipeline.data.base import Loader
from pipeline.measure.activity import Activity, LayerActivity, firing_rate
from pipeline.measure.constants import ACTIVITY_EVERY
from pipeline.measure.energy import EnergyCounter, EnergyReadings, Inference
from pipeline.measure.operations import Operations, Work
from pipeline.measure.sample_evenly import EvenSample
from pipeline.spiking.encode import over_steps
from pipeline.spiking.state import fresh_state
from pipeline.train.backend.collectives import Ranks
from pipeline.train.objective import Loss
from pipeline.train.predictions import Answers, answers_of

TOP = 5
"""how many of the best classes top-5 looks at"""
COUNTED = 64
"""samples at most of which operations are counted"""
COUNTED_ON = "from all over the first worker's share of the evaluation set"
"""for a summary, which has the operations of that worker"""


@dataclass(frozen=True)
class Evaluation:
    """Shares in 0..1; the firing rate is spikes per neuron and time step, of the samples on which
    they are counted.
    """

    samples: int
    top1: float
    top5: float | None
    """None under six classes, where it would say nothing"""
    loss: float
    firing_rate: float

    @property
    def metrics(self) -> dict[str, float]:
        """By name, without what was not measured; the number of samples is none of them."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name != "samples" and value is not None
        }


class Evaluated(NamedTuple):
    """What an evaluation gives beside its figures."""

    result: Evaluation
    """of all ranks together"""
    answers: Answers
    """of this rank"""
    activity: tuple[LayerActivity, ...]
    """of all ranks together, on one sample in `ACTIVITY_EVERY`; none for a network without
    neurons
    """
    inference: Inference | None
    """of samples spread over this rank's share; None without one, or where operations were not
    counted
    """
    readings: EnergyReadings
    """of this rank's card"""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    loss_for: Loss,
    *,
    over_time: str = "steps",
    network: nn.Module | None = None,
    counts_operations: bool = False,
    joules: EnergyCounter | None = None,
    when_answered: Callable[[], None] = lambda: None,
) -> Evaluated:
    """Run the model over this rank's share of a set; collective.

    Args:
        batches: (x_TB, target_B, index_B); ranks may hold different numbers of them, or none.
        network: the bare network inside, by whose names the layers of neurons are told; None: the
        model itself. joules: of the card that it runs on, read before the first batch is asked for
        and after the last one's answers are there,
            so without the counting of operations; None: not measured.
        when_answered: called at that moment, too.
    """
    network, joules = network or model, joules or EnergyCounter(torch.device("cpu"))
    was_training = model.training
    model.eval()
    answered: list[Tensor] = []  # index, target and answer of each batch
    sums = torch.zeros(
        5, dtype=torch.float64
    )  # samples, top-1 hits, loss; samples of six classes or more, top-5 hits
    counted, largest = EvenSample(COUNTED), 1
    began = joules.read()
    with Activity(network, every=ACTIVITY_EVERY) as activity:
        for x_TB, target_B, index_B in batches:
            samples = len(target_B)
            if counts_operations:
                counted.add(x_TB)
                largest = max(largest, samples)
            with activity.batch(index_B), fresh_state(model):
                logits_TBK = model(x_TB).float()
            loss_of = loss_for(target_B)
            mean_BK = logits_TBK.mean(0)
            if over_time == "mean":
                loss = loss_of(mean_BK)
            else:
                loss = torch.stack([loss_of(logits_BK) for logits_BK in logits_TBK]).mean()
            best_B5 = best(mean_BK)
            hits_B5 = best_B5 == target_B[:, None]
            found = [samples, float(hits_B5[:, 0].sum()), float(loss.double() * samples)]
            found += [samples, float(hits_B5.sum())] if mean_BK.shape[-1] > TOP else [0, 0]
            sums += torch.tensor(found, dtype=torch.float64)
            answered.append(torch.stack([index_B, target_B.cpu(), best_B5[:, 0].cpu()]))
    readings = EnergyReadings(
        card=joules.card, samples=int(sums[0]), began=began, ended=joules.read()
    )
    when_answered()
    inference = _inference(model, network, counted, batch_size=largest) if len(counted) else None
    model.train(was_training)
    samples, top1, loss, ranked, top5 = _over_ranks(model, distributed.ReduceOp.SUM)(sums).tolist()
    if samples == 0:
        raise ValueError("evaluate: needs at least one sample; got none on any rank")
    layers = activity.layers(
        *(_over_ranks(model, how) for how in (distributed.ReduceOp.SUM, distributed.ReduceOp.MAX))
    )
    share_top5 = top5 / ranked if ranked else None
    result = Evaluation(
        int(samples), top1 / samples, share_top5, loss / samples, firing_rate(layers)
    )
    return Evaluated(result, answers_of(answered), layers, inference, readings)


def _inference(
    model: nn.Module, network: nn.Module, counted: EvenSample, *, batch_size: int
) -> Inference:
    """Counted in batches no larger than those that were evaluated, which fit."""
    with Operations(network) as operations:
        for x_TB in counted.batches(batch_size):
            with fresh_state(model):
                model(x_TB)
    # Of the forward alone: what a rule or a limit adds to it is no inference's.
    return Inference(
        operations.work.get("forward", Work()), len(counted), tuple(sorted(operations.not_counted))
    )


def _over_ranks(
    model: nn.Module, how: distributed.ReduceOp.RedOpType
) -> Callable[[Tensor], Tensor]:
    """A reduction of vectors on the CPU."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return lambda value: value
    device = next(model.parameters()).device

    def reduce(value: Tensor) -> Tensor:
        shared = value.to(device, copy=True)
        distributed.all_reduce(shared, op=how)
        return shared.cpu()

    return reduce


def best(logits_BK: Tensor) -> Tensor:
    """The best class, the second best, ...: `[B, 5]`, narrower where there are fewer classes."""
    return logits_BK.topk(min(TOP, logits_BK.shape[-1])).indices


def hits(logits_BK: Tensor, target_B: Tensor) -> Tensor:
    """Whether the label is the best class, the second best, ...: `[B, 5]`, as `best`."""
    return best(logits_BK) == target_B[:, None]


def inputs(
    loader: Loader,
    time_steps: int,
    device: torch.device,
    *,
    most: int | None = None,
    epoch: int = 0,
) -> Generator[tuple[Tensor, Tensor, Tensor]]:
    """What `evaluate` takes, from this rank's batches: all of them, or the first `most` samples.
    Close it if you leave early.

    `epoch`: the same samples whichever it is; who evaluates again with another has other pages of
    the data compared."""
    left = most
    with loader.epoch(epoch) as batches:
        for batch in batches:
            x_B, target_B, index_B = batch.x[:left], batch.target[:left], batch.index[:left]
            if left is not None:
                left -= len(target_B)
            if len(target_B):
                yield over_steps(x_B.to(device), time_steps), target_B.to(device), index_B
            if left == 0:
                return


def share_of(samples: int | None, ranks: Ranks) -> int | None:
    """How many of the first `samples` this rank evaluates; None: its whole share of the set."""
    return None if samples is None else len(range(ranks.rank, samples, ranks.size))


def mean_of(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Over tasks, each counting as one however many samples it has; ACC is the top-1 of this."""

    def mean(name: str) -> float:
        return sum(getattr(each, name) for each in evaluations) / len(evaluations)

    return Evaluation(
        samples=sum(each.samples for each in evaluations),
        top1=mean("top1"),
        top5=None if any(each.top5 is None for each in evaluations) else mean("top5"),
        loss=mean("loss"),
        firing_rate=mean("firing_rate"),
    )
