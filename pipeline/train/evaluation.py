"""Exact evaluation over ranks: sums are reduced, no batch is padded, and no sample counts twice.

`RUN/answers.npz` contains the predictions of a run's last evaluation. So two runs that were
evaluated on one set can be compared sample by sample.

T time, B batch, N samples, K classes, k the most probable of them (`TOP_K`, or all)
"""

import io
import time
import zipfile
from collections import namedtuple
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
from pipeline.rules.base import LossFn, OverTime, slice_loss, slices
from pipeline.spiking.encode import to_time_first
from pipeline.spiking.norm import is_foreign_norm
from pipeline.spiking.rate import WeightedRates
from pipeline.spiking.slice_cache import slice_cache
from pipeline.spiking.state import fresh_state
from pipeline.train.backend.collectives import Ranks
from pipeline.train.objective import Loss, to_fp32
from pipeline.train.transfer import Arriving, arriving

if TYPE_CHECKING:
    from pipeline.train.assemble import TrainContext

TOP_K = 5  # classes of the top-5 accuracy
MAX_COUNTED_SAMPLES = 64  # operations are counted on up to this many samples of each rank
LOOK_S = 1.0  # seconds between two looks for a request to stop or to save


@dataclass(frozen=True)
class Evaluation:
    samples: int
    top1: float  # a share in 0..1
    top5: float | None  # a share in 0..1; None if there are fewer than six classes
    loss: float  # the mean over samples
    firing_rate: float  # spikes per neuron and time step, over the samples with counted spikes

    @property
    def metrics(self) -> dict[str, float]:
        """The measured values that are known, by name. `samples` is not among them."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name != "samples" and value is not None
        }


Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """Arrays with one row per sample, int64 except for `probability`."""

    index: Ints  # `Batch.index`: the sample's position in the evaluation file
    target: Ints
    top: Ints  # [N, k]: the classes with the highest mean logits, the highest first
    probability: NDArray[np.float32]  # [N, k]: the softmax of the mean logits at these classes
    # the number of each sample's task, read from a file of a run with phases; else None
    task: Ints | None = None

    @property
    def answer(self) -> Ints:
        """The predicted class of each sample."""
        return self.top[:, 0]

    @property
    def is_correct(self) -> NDArray[np.bool_]:
        return self.answer == self.target


class EvaluationOutput(NamedTuple):
    result: Evaluation  # over all ranks
    predictions: Predictions  # this rank's
    # over all ranks, from one sample in `ACTIVITY_EVERY`; () if the network has no neurons
    activity: tuple[LayerActivity, ...]
    # from samples spread over this rank's share; None if no operations were counted
    inference: Inference | None
    readings: EnergyReadings  # of this rank's card


# sums over samples; top1 and top5 count hits; top5_samples is `samples`, or 0 without a top-5
# accuracy
_Sums = namedtuple("_Sums", ("samples", "top1", "loss", "top5_samples", "top5"))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    loss_for: Loss,
    *,
    over_time: OverTime = "steps",
    network: nn.Module | None = None,
    ranks: Ranks | None = None,
    counts_operations: bool = False,
    energy_counter: EnergyCounter | None = None,
    on_last_prediction: Callable[[], None] = lambda: None,
    activity_every: int = ACTIVITY_EVERY,
) -> EvaluationOutput:
    """Evaluate the model on this rank's share of a set. Collective.

    The model gets one time step per call, so the memory does not grow with T, except that a network
    which needs all T steps in one call gets them. No batch waits for a GPU: all values are read
    after the last batch.

    Args:
        batches: (x_TB, target_B, index_B) of each batch; index_B is on the CPU. Ranks may have
            different numbers of batches, or none.
        network: the network inside `model`, whose modules name the layers; None: `model` itself.
        ranks: the ranks that share the set; None: this process is the only one.
        energy_counter: of the model's card. It is read before the first batch and after the last
            prediction, so its energy excludes the counting of operations. None: not measured.
        on_last_prediction: called after the last prediction.
        activity_every: spikes are counted on one in so many samples.

    Raises:
        ValueError: there is no sample on any rank.
    """
    network, ranks = network or model, ranks or Ranks()
    energy_counter = energy_counter or EnergyCounter(torch.device("cpu"))
    was_training = model.training
    model.eval()
    chunk = None if _needs_all_steps(model) else 1
    indices, scores = list[Tensor](), list[Tensor]()
    counted_samples, size = RandomSample(MAX_COUNTED_SAMPLES), 1
    began = energy_counter.read()
    with Activity(network, every=activity_every) as activity:
        for x_TB, target_B, index_B in batches:
            if counts_operations:
                counted_samples.add(x_TB)
                size = max(size, len(target_B) // (len(x_TB) if chunk else 1))
            with activity.batch(index_B):
                loss, mean_BK = _run(model, x_TB, loss_for(target_B), over_time, chunk)
            indices.append(index_B)
            scores.append(_scores(mean_BK, target_B, loss))
    sums, predictions = _read(indices, scores)
    readings = EnergyReadings(
        card=energy_counter.card, samples=sums.samples, start_j=began, end_j=energy_counter.read()
    )
    on_last_prediction()
    inference = _inference(model, network, counted_samples, size)
    model.train(was_training)
    layers = activity.layers(ranks.sum, ranks.max)
    result = _over_ranks(sums, ranks, firing_rate(layers))
    return EvaluationOutput(result, predictions, layers, inference, readings)


def _needs_all_steps(model: nn.Module) -> bool:
    """Whether a module needs all T steps in one call, also in evaluation mode: `WeightedRates`, or
    a norm of torch without running statistics.
    """
    return any(
        isinstance(module, WeightedRates)
        or (is_foreign_norm(module) and not getattr(module, "track_running_stats", True))
        for module in model.modules()
    )


def _run(
    model: nn.Module, x_TB: Tensor, loss_fn: LossFn, over_time: OverTime, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """The loss and the mean logits `[B, K]`. `chunk`: the number of time steps per call; None: all.

    Only the state of the model, and what all slices share, pass from slice to slice.
    """
    loss = mean_BK = x_TB.new_zeros(())
    with fresh_state(model), slice_cache(model, steps=len(x_TB), backwards="one"):
        for x_cB in slices(x_TB, chunk):
            terms = slice_loss(to_fp32(model(x_cB)), loss_fn, steps=len(x_TB))
            loss, mean_BK = loss + terms[0], mean_BK + terms[1]
    return loss if over_time == "steps" else loss_fn(mean_BK), mean_BK


def _scores(mean_BK: Tensor, target_B: Tensor, loss: Tensor) -> Tensor:
    """float64 `[3 + 2 k, B]`: target, whether the target is among the k classes with the highest
    mean logits (NaN: there are fewer than six classes), the batch's mean loss, these k classes, and
    their probabilities.
    """
    top_Bk = mean_BK.topk(min(TOP_K, mean_BK.shape[-1])).indices
    is_hit_B = (top_Bk == target_B[:, None]).any(1).double()
    if mean_BK.shape[-1] <= TOP_K:
        is_hit_B.fill_(torch.nan)
    columns_B = [target_B.double(), is_hit_B, loss.double().expand(len(target_B))]
    probability_Bk = mean_BK.softmax(-1).gather(1, top_Bk)
    return torch.cat([torch.stack(columns_B), top_Bk.T.double(), probability_Bk.T.double()])


def _read(indices: list[Tensor], scores: list[Tensor]) -> tuple[_Sums, Predictions]:
    """This rank's sums and predictions, from the `_scores` of its batches. Waits for a GPU."""
    # The empty tensors are for ranks without batches.
    index = torch.cat(indices or [torch.zeros(0, dtype=torch.int64)]).numpy()
    columns = torch.cat(scores or [torch.zeros(5, 0, dtype=torch.float64)], dim=1).cpu().numpy()
    (target, is_hit, loss), rest = columns[:3], columns[3:]
    top, probability = np.split(rest.T, 2, axis=1)
    predictions = Predictions(
        index=index,
        target=target.astype(np.int64),
        top=top.astype(np.int64),
        probability=probability.astype(np.float32),
    )
    sums = _Sums(
        samples=len(index),
        top1=predictions.is_correct.sum(),
        loss=loss.sum(),
        top5_samples=np.isfinite(is_hit).sum(),
        top5=np.nansum(is_hit),
    )
    return sums, predictions


def _inference(
    model: nn.Module, network: nn.Module, samples: RandomSample, size: int
) -> Inference | None:
    """The work on `samples`, all T steps in one call; None without a sample.

    `size`: the number of samples per call. Their T steps take no more memory than a call of the
    evaluation.
    """
    if not len(samples):
        return None
    with Operations(network) as operations:
        for x_TB in samples.batches(size):
            with fresh_state(model):
                model(x_TB)
    # The work of other purposes is left out, because inference needs no rule.
    work = operations.work.get("forward", Work())
    return Inference(work, len(samples), tuple(sorted(operations.not_counted)))


def _over_ranks(sums: _Sums, ranks: Ranks, firing_rate: float) -> Evaluation:
    total = _Sums(*ranks.sum(torch.tensor(sums, dtype=torch.float64)).tolist())
    require(total.samples > 0, "evaluate: needs at least one sample; got none on any rank")
    return Evaluation(
        samples=int(total.samples),
        top1=total.top1 / total.samples,
        top5=total.top5 / total.top5_samples if total.top5_samples else None,
        loss=total.loss / total.samples,
        firing_rate=firing_rate,
    )


def evaluation_batches(
    loader: Loader,
    time_steps: int,
    ranks: Ranks,
    *,
    max_samples: int | None = None,
    epoch: int = 0,
) -> Generator[tuple[Tensor, Tensor, Tensor]]:
    """This rank's batches for `evaluate`. Close the generator if you stop before its end.

    Args:
        max_samples: limit for all ranks together. Each rank takes the first samples of its own part
            of the set, so the samples depend on the number of ranks. None: all samples.
        epoch: selects the pages of the data that are checked, not the samples.
    """
    remaining = None if max_samples is None else len(range(ranks.rank, max_samples, ranks.size))
    with loader.epoch(epoch) as batches:
        for batch in map(Arriving.arrive, arriving(batches, ranks.device)):
            x_B, target_B, index_B = (
                tensor[:remaining] for tensor in (batch.x, batch.target, batch.index)
            )
            if remaining is not None:
                remaining -= len(target_B)
            if len(target_B):
                yield to_time_first(x_B, time_steps), target_B, index_B
            if remaining == 0:
                return


def evaluate_tasks(
    context: "TrainContext",
    *,
    step: int,
    tasks_so_far: int,
    counts_operations: bool,
    is_interrupted: Callable[[], bool],
) -> list[EvaluationOutput] | None:
    """Evaluate the published network on each of the first `tasks_so_far` tasks, in their order.
    Returns None if a rank interrupted an evaluation. Collective.

    Args:
        step: the step of the run. It selects the pages of the data that are compared with their
            checksums.
        is_interrupted: whether this rank sees a request to stop or to save. Each rank calls it
            about once a second, at its own times, because ranks have different numbers of batches.
    """
    recipe, ranks, network = context.recipe, context.ranks, context.backend.network
    evaluated = list[EvaluationOutput]()
    energy_counter = EnergyCounter(ranks.device)
    was_interrupted = False

    def until_interrupted(val_set: Loader) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        nonlocal was_interrupted
        looked_at, max_samples = time.monotonic(), recipe.evaluation.samples
        every_batch = evaluation_batches(
            val_set, recipe.time_steps, ranks, max_samples=max_samples, epoch=step
        )
        with closing(every_batch) as batches:
            for batch in batches:
                context.watchdog.beat()
                yield batch
                if time.monotonic() - looked_at > LOOK_S:
                    looked_at = time.monotonic()
                    if was_interrupted := is_interrupted():
                        return

    with context.meters.evaluating() as note_peaks, context.published():
        for index, task in enumerate(context.loaders.tasks[:tasks_so_far]):
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
                        energy_counter=energy_counter,
                        on_last_prediction=note_peaks,
                    )
                )
            if ranks.max(torch.tensor(float(was_interrupted))):
                return None
    return evaluated


def mean_over_tasks(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The mean over tasks, each with the same weight; the sum of their samples. `top1` is ACC."""
    columns = {
        name: [getattr(each, name) for each in evaluations] for name in asdict(evaluations[0])
    }
    means = {
        name: None if None in values else sum(values) / len(values)
        for name, values in columns.items()
    }
    return Evaluation(**{**means, "samples": sum(columns["samples"])})


def write_predictions(
    file: Path, by_rank: Sequence[Sequence[Predictions]], *, has_task_column: bool
) -> None:
    """Write the predictions of every rank for each task (`by_rank[rank][task]`), sorted by task and
    index. The file is whole or absent.
    """
    parts = [
        # a rank without samples does not know k
        (task, part)
        for by_task in by_rank
        for task, part in enumerate(by_task)
        if len(part.index)
    ]
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for _, part in parts])
        for name in ("index", "target", "top", "probability")
    }
    task_N = np.repeat([task for task, _ in parts], [len(part.index) for _, part in parts])
    order = np.lexsort((columns["index"], task_N))
    if has_task_column:
        columns["task"] = task_N
    stream = io.BytesIO()
    np.savez(stream, **{name: column[order] for name, column in columns.items()})
    write_whole(file, stream.getvalue())


def read_predictions(file: Path) -> Predictions:
    """Read a file of `write_predictions`. Raises: ValueError if it is missing or malformed."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            predictions = Predictions(**arrays)
    except (TypeError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"answers: {file} must be the file that a run writes at its end, with index, target and"
            f" the top classes of each sample; it could not be read: {error}"
        ) from error
    layout = {
        name: (each.dtype.kind, each.ndim)
        for name, each in vars(predictions).items()
        if each is not None
    }
    expected = {
        "index": ("i", 1),
        "target": ("i", 1),
        "top": ("i", 2),
        "probability": ("f", 2),
        "task": ("i", 1),
    }
    require(
        layout.items() <= expected.items()
        and len({len(each) for each in vars(predictions).values() if each is not None}) == 1
        and predictions.top.shape == predictions.probability.shape,
        f"answers: {file} must hold whole numbers, and probabilities, with one row for each sample",
    )
    return predictions
