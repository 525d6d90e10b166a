"""Exact evaluation over ranks: sums are reduced, nothing is padded, no sample counts twice.

The predictions of a run's last evaluation are in `RUN/answers.npz`. So two runs that were evaluated
on one set can be compared sample by sample.

T time, B batch, N samples, K classes
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn

from pipeline.core.checks import require
from pipeline.data.base import Loader
from pipeline.measure.activity import Activity, LayerActivity, firing_rate
from pipeline.measure.constants import ACTIVITY_EVERY
from pipeline.measure.energy import EnergyCounter, EnergyReadings, EvenSample, Inference
from pipeline.measure.operations import Operations, Work
from pipeline.spiking.encode import over_steps
from pipeline.spiking.state import fresh_state
from pipeline.train.backend.collectives import Ranks, world
from pipeline.train.objective import Loss

TOP = 5  # classes of the top-5 accuracy
COUNTED = 64  # the most samples whose operations are counted
# describes, in a summary, the samples whose operations were counted
COUNTED_ON = "from all over the first worker's share of the evaluation set"


@dataclass(frozen=True)
class Evaluation:
    """Shares in 0..1. The firing rate is spikes per neuron and time step, of the samples on which
    spikes are counted.
    """

    samples: int
    top1: float
    top5: float | None  # None if there are fewer than six classes
    loss: float
    firing_rate: float

    @property
    def metrics(self) -> dict[str, float]:
        """The measured values by name, without the number of samples."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name != "samples" and value is not None
        }


class Evaluated(NamedTuple):
    """An evaluation and the data behind it."""

    result: Evaluation  # of all ranks together
    answers: Answers  # of this rank
    # of all ranks together, on one sample in `ACTIVITY_EVERY`; () without neurons
    activity: tuple[LayerActivity, ...]
    # of samples spread over this rank's share; None if operations were not counted
    inference: Inference | None
    readings: EnergyReadings  # of this rank's card


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
    """Run the model over this rank's share of a set. Collective.

    Args:
        batches: (x_TB, target_B, index_B); ranks may hold different numbers of them, or none.
        network: the bare network inside, which names the layers; None: the model itself.
        joules: the energy counter of the model's card. It is read before the first batch is read
            and after the last prediction, so it excludes the counting of operations. None: not
            measured.
        when_answered: called after the last prediction.

    Raises:
        ValueError: there is no sample on any rank.
    """
    network, joules = network or model, joules or EnergyCounter(torch.device("cpu"))
    was_training = model.training
    model.eval()
    answered = [torch.zeros(3, 0, dtype=torch.int64)]  # index, target, answer of each batch
    # samples, top-1 hits, loss; samples of six classes or more, top-5 hits
    sums = torch.zeros(5, dtype=torch.float64)
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
            best_B5 = mean_BK.topk(min(TOP, mean_BK.shape[-1])).indices
            hits_B5 = best_B5 == target_B[:, None]
            batch_sums = [samples, float(hits_B5[:, 0].sum()), float(loss.double() * samples)]
            batch_sums += [samples, float(hits_B5.sum())] if mean_BK.shape[-1] > TOP else [0, 0]
            sums += torch.tensor(batch_sums, dtype=torch.float64)
            answered.append(torch.stack([index_B, target_B.cpu(), best_B5[:, 0].cpu()]))
    readings = EnergyReadings(
        card=joules.card, samples=int(sums[0]), began=began, ended=joules.read()
    )
    when_answered()
    inference = _inference(model, network, counted, batch_size=largest) if len(counted) else None
    model.train(was_training)
    device = next(model.parameters()).device
    total, largest_of = (
        partial(_over_ranks, device=device, how=how)
        for how in (distributed.ReduceOp.SUM, distributed.ReduceOp.MAX)
    )
    samples, top1, loss, ranked, top5 = total(sums).tolist()
    require(samples != 0, "evaluate: needs at least one sample; got none on any rank")
    layers = activity.layers(total, largest_of)
    share_top5 = top5 / ranked if ranked else None
    result = Evaluation(
        int(samples), top1 / samples, share_top5, loss / samples, firing_rate(layers)
    )
    index, target, answer = torch.cat(answered, dim=1).numpy()
    answers = Answers(index=index, target=target, answer=answer)
    return Evaluated(result, answers, layers, inference, readings)


def _inference(
    model: nn.Module, network: nn.Module, counted: EvenSample, *, batch_size: int
) -> Inference:
    """The operations of an inference, counted in batches no larger than those of the evaluation,
    which fit in memory.
    """
    with Operations(network) as operations:
        for x_TB in counted.batches(batch_size):
            with fresh_state(model):
                model(x_TB)
    # The forward alone: inference has no rule.
    return Inference(
        operations.work.get("forward", Work()), len(counted), tuple(sorted(operations.not_counted))
    )


def _over_ranks(value: Tensor, device: torch.device, how: Any) -> Tensor:
    """Reduce a vector on the CPU over ranks."""
    if world()[1] == 1:
        return value
    shared = value.to(device, copy=True)
    distributed.all_reduce(shared, op=how)
    return shared.cpu()


def inputs(
    loader: Loader,
    time_steps: int,
    device: torch.device,
    *,
    most: int | None = None,
    epoch: int = 0,
) -> Generator[tuple[Tensor, Tensor, Tensor]]:
    """The batches for `evaluate`: all of this rank's, or those of the first `most` samples. Close
    the generator if you leave it early.

    `epoch` selects the pages of the data that are checked. The samples are always the same.
    """
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
    """This rank's number of the first `samples` of the set; None: its whole share of the set."""
    return None if samples is None else len(range(ranks.rank, samples, ranks.size))


def mean_of(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The mean over tasks, each with the same weight. Its top-1 is ACC."""

    def mean(name: str) -> float:
        return sum(getattr(each, name) for each in evaluations) / len(evaluations)

    return Evaluation(
        samples=sum(each.samples for each in evaluations),
        top1=mean("top1"),
        top5=None if any(each.top5 is None for each in evaluations) else mean("top5"),
        loss=mean("loss"),
        firing_rate=mean("firing_rate"),
    )


Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """Predictions: int64 arrays `[N]` with one entry per sample."""

    index: Ints  # the sample's place in the evaluation file, as `Batch.index` counts
    target: Ints
    answer: Ints  # the class with the highest mean logit
    # the task to whose evaluation set sample and index belong; None: the run has no phases
    task: Ints | None = None

    @property
    def right(self) -> NDArray[np.bool_]:
        return self.answer == self.target


def write_answers(file: Path, shares: Sequence[Sequence[Answers]], *, tasks: bool) -> None:
    """Write the answers of every rank for each task (`shares[rank][task]`), sorted by task and
    index. The file is whole or absent.

    `tasks`: whether the file has a column with the task of each sample.
    """
    sorted_3N = [_sorted(of_task) for of_task in zip(*shares, strict=True)]
    columns: dict[str, Ints] = dict(
        zip(("index", "target", "answer"), np.concatenate(sorted_3N, axis=1), strict=True)
    )
    if tasks:
        columns["task"] = np.repeat(
            np.arange(len(sorted_3N)), [each.shape[1] for each in sorted_3N]
        )
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with temporary.open("wb") as stream:  # a stream, as savez would add its own suffix to a name
        # no column has the name of numpy's own keyword, allow_pickle
        np.savez(stream, **columns)  # type: ignore[arg-type]
    temporary.rename(file)


def read_answers(file: Path) -> Answers:
    """Read the file of `write_answers`. Raises: ValueError if it is missing or another file."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            answers = Answers(**arrays)
    except FileNotFoundError:
        raise ValueError(f"answers: {file} must be there; a run writes it at its end") from None
    except (TypeError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"answers: {file} must hold index, target and answer; it could not be read: {error}"
        ) from error
    columns = [getattr(answers, name) for name in ("index", "target", "answer", "task")]
    columns = [column for column in columns if column is not None]
    got = ", ".join(f"{column.dtype} {list(column.shape)}" for column in columns)
    require(
        all(column.ndim == 1 and np.issubdtype(column.dtype, np.integer) for column in columns),
        f"answers: {file} must hold columns of whole numbers; got {got}",
    )
    require(
        len({len(column) for column in columns}) == 1,
        f"answers: {file} must hold an entry a sample in each column; got {got}",
    )
    return answers


def _sorted(shares: Sequence[Answers]) -> Ints:
    """`[3,N]`: the shares of all ranks in the order of their samples."""
    all_3N = np.concatenate(
        [np.stack([each.index, each.target, each.answer]) for each in shares], axis=1
    )
    return all_3N[:, np.argsort(all_3N[0])]
