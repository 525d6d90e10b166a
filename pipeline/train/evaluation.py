"""Exact evaluation over ranks: sums are reduced, nothing is padded, no sample counts twice.

The predictions of a run's last evaluation are in `RUN/answers.npz`. So two runs that were evaluated
on one set can be compared sample by sample.

T time, B batch, N samples, K classes
"""

import io
import time
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.core.checks import require
from pipeline.core.files import write_whole
from pipeline.data.base import Loader
from pipeline.measure.activity import Activity, LayerActivity, firing_rate
from pipeline.measure.constants import ACTIVITY_EVERY
from pipeline.measure.energy import EnergyCounter, EnergyReadings, Inference, RandomSample
from pipeline.measure.operations import Operations, Work
from pipeline.spiking.encode import over_steps
from pipeline.spiking.state import fresh_state
from pipeline.train.backend.collectives import Ranks
from pipeline.train.objective import Loss

if TYPE_CHECKING:
    from pipeline.train.assemble import TrainContext

TOP = 5  # classes of the top-5 accuracy
COUNTED = 64  # the most samples whose operations are counted
LOOK_S = 1.0  # seconds between two looks for a request to stop or to save


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
    ranks: Ranks | None = None,
    counts_operations: bool = False,
    joules: EnergyCounter | None = None,
    when_answered: Callable[[], None] = lambda: None,
) -> Evaluated:
    """Run the model over this rank's share of a set. Collective.

    Args:
        batches: (x_TB, target_B, index_B); ranks may hold different numbers of them, or none.
        network: the bare network inside, which names the layers; None: the model itself.
        ranks: the ranks that hold the shares; None: this process is the only one.
        joules: the energy counter of the model's card. It is read before the first batch is read
            and after the last prediction, so it excludes the counting of operations. None: not
            measured.
        when_answered: called after the last prediction.

    Raises:
        ValueError: there is no sample on any rank.
    """
    network, ranks = network or model, ranks or Ranks()
    joules = joules or EnergyCounter(torch.device("cpu"))
    was_training = model.training
    model.eval()
    answered = [torch.zeros(3, 0, dtype=torch.int64)]  # index, target, answer of each batch
    # samples, top-1 hits, loss; samples of six classes or more, top-5 hits
    sums = torch.zeros(5, dtype=torch.float64)
    counted, largest = RandomSample(COUNTED), 1
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
            has_top5 = mean_BK.shape[-1] > TOP
            ranked, top5 = (samples, hits_B5.sum()) if has_top5 else (0, 0)
            sums += torch.tensor(
                [samples, hits_B5[:, 0].sum(), loss.double() * samples, ranked, top5],
                dtype=torch.float64,
            )
            answered.append(torch.stack([index_B, target_B.cpu(), best_B5[:, 0].cpu()]))
    readings = EnergyReadings(
        card=joules.card, samples=int(sums[0]), start_j=began, end_j=joules.read()
    )
    when_answered()
    inference = None
    if len(counted):
        with Operations(network) as operations:
            # In batches no larger than those of the evaluation, which fit in memory.
            for x_TB in counted.batches(largest):
                with fresh_state(model):
                    model(x_TB)
        # The forward alone: inference has no rule.
        inference = Inference(
            operations.work.get("forward", Work()),
            len(counted),
            tuple(sorted(operations.not_counted)),
        )
    model.train(was_training)
    samples, top1, loss, ranked, top5 = ranks.sum(sums).tolist()
    require(samples != 0, "evaluate: needs at least one sample; got none on any rank")
    layers = activity.layers(ranks.sum, ranks.max)
    index, target, answer = torch.cat(answered, dim=1).numpy()
    return Evaluated(
        Evaluation(
            samples=int(samples),
            top1=top1 / samples,
            top5=top5 / ranked if ranked else None,
            loss=loss / samples,
            firing_rate=firing_rate(layers),
        ),
        Answers(index=index, target=target, answer=answer),
        layers,
        inference,
        readings,
    )


def inputs(
    loader: Loader,
    time_steps: int,
    ranks: Ranks,
    *,
    most: int | None = None,
    epoch: int = 0,
) -> Generator[tuple[Tensor, Tensor, Tensor]]:
    """The batches for `evaluate`: all of this rank's, or its share of the first `most` samples of
    the set. Close the generator if you leave it early.

    `epoch` selects the pages of the data that are checked. The samples are always the same.
    """
    left = None if most is None else len(range(ranks.rank, most, ranks.size))
    with loader.epoch(epoch) as batches:
        for batch in batches:
            x_B, target_B, index_B = batch.x[:left], batch.target[:left], batch.index[:left]
            if left is not None:
                left -= len(target_B)
            if len(target_B):
                yield (
                    over_steps(x_B.to(ranks.device), time_steps),
                    target_B.to(ranks.device),
                    index_B,
                )
            if left == 0:
                return


def evaluate_tasks(
    context: "TrainContext",
    *,
    step: int,
    tasks: int,
    counts_operations: bool,
    is_interrupted: Callable[[], bool],
) -> list[Evaluated] | None:
    """Evaluate the published network on each of the first `tasks`, the current one last. None if an
    evaluation was interrupted on any rank. Collective.

    Args:
        step: the step of the run. It selects the pages of the data that are compared with their
            checksums.
        is_interrupted: whether this rank sees a request to stop or to save. Each rank calls it
            about once a second, at its own times, because ranks have different numbers of batches.
    """
    recipe, ranks, network = context.recipe, context.ranks, context.backend.network
    evaluated, joules, was_interrupted = list[Evaluated](), EnergyCounter(ranks.device), False

    def until_interrupted(val_set: Loader) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        nonlocal was_interrupted
        looked_at = time.monotonic()
        most = recipe.evaluation.samples
        for batch in inputs(val_set, recipe.time_steps, ranks, most=most, epoch=step):
            context.watchdog.beat()
            yield batch
            if time.monotonic() - looked_at > LOOK_S:
                looked_at = time.monotonic()
                if was_interrupted := is_interrupted():
                    return

    with context.meters.evaluating() as note_peaks, context.published():
        for index, task in enumerate(context.loaders.tasks[:tasks]):
            task.choose_head(network)
            with closing(context.loaders.val(index)) as val_set:
                evaluated.append(
                    evaluate(
                        context.backend.model,
                        until_interrupted(val_set),
                        recipe.objective.build().labels,
                        over_time=recipe.over_time,
                        network=network,
                        ranks=ranks,
                        counts_operations=counts_operations,
                        joules=joules,
                        when_answered=note_peaks,
                    )
                )
            if ranks.max(torch.tensor(float(was_interrupted))):
                return None
    return evaluated


def mean_of(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The mean over tasks, each with the same weight. Its top-1 is ACC."""
    columns = {
        name: [getattr(each, name) for each in evaluations] for name in asdict(evaluations[0])
    }
    means = {
        name: None if None in values else sum(values) / len(values)
        for name, values in columns.items()
    }
    return Evaluation(**{**means, "samples": sum(columns["samples"])})


def write_answers(file: Path, shares: Sequence[Sequence[Answers]], *, tasks: bool) -> None:
    """Write the answers of every rank for each task (`shares[rank][task]`), sorted by task and
    index. The file is whole or absent.

    `tasks`: whether the file has a column with the task of each sample.
    """
    all_answers = [(task, each) for of_rank in shares for task, each in enumerate(of_rank)]
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(each, name) for _, each in all_answers])
        for name in ("index", "target", "answer")
    }
    task_N = np.repeat(
        [task for task, _ in all_answers], [len(each.index) for _, each in all_answers]
    )
    order = np.lexsort((columns["index"], task_N))
    if tasks:
        columns["task"] = task_N
    stream = io.BytesIO()
    np.savez(stream, **{name: column[order] for name, column in columns.items()})
    write_whole(file, stream.getvalue())


def read_answers(file: Path) -> Answers:
    """Read the file of `write_answers`. Raises: ValueError if it is missing or another file."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            answers = Answers(**arrays)
    except (TypeError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"answers: {file} must be the file that a run writes at its end, with index, target and"
            f" answer of each sample; it could not be read: {error}"
        ) from error
    columns = [each for each in vars(answers).values() if each is not None]
    require(
        all(each.ndim == 1 and each.dtype.kind == "i" for each in columns)
        and len({len(each) for each in columns}) == 1,
        f"answers: {file} must hold columns of whole numbers, one for each sample",
    )
    return answers
