"""An evaluation: what is counted and when top-5 is measured, and `RUN/answers.npz`, which has each
sample once. backend/test_collectives.py tests its figures over ranks.
"""

import itertools
import os
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pipeline
from pipeline.data.base import Data
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.measure.operations import Operations
from pipeline.recipe.recipe import Evaluation, read_json, spec
from pipeline.spiking.encode import to_time_first
from pipeline.spiking.neuron import LIF
from pipeline.spiking.state import fresh_state
from pipeline.spiking.synapse import Linear
from pipeline.train import evaluation
from pipeline.train.evaluation import (
    MAX_COUNTED_SAMPLES,
    EvaluationOutput,
    Predictions,
    evaluate,
    read_predictions,
    write_predictions,
)
from pipeline.train.job import Job, RankInfo
from pipeline.train.objective import CrossEntropy
from pipeline.train.tasks import tasks_of
from pipeline.train.trainer import Trainer
from pipeline.train.worker import run
from tests import test_continual as continual
from tests.helpers.interruptions import dies
from tests.helpers.processes import run_ranks
from tests.helpers.small import finished, make_run, small_recipe, train_inline

T, B, I, K = 3, 192, 4, 7


def sorted_set() -> Tensor:
    """As a file that is sorted by class: the first half is silence, the second is loud."""
    x_TBI = torch.rand(T, B, I, generator=torch.Generator().manual_seed(0)) + 1
    x_TBI[:, : B // 2] = 0
    return x_TBI


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Linear(I, 6, bias=False), LIF(), Linear(6, K))


@pytest.mark.parametrize(("classes", "measured"), [(2, False), (5, False), (6, True)])
def test_top_5_is_measured_of_six_classes_or_more(classes: int, measured: bool) -> None:
    model, x_TBI = nn.Sequential(Linear(I, classes)), torch.rand(T, 12, I)
    target_B = torch.arange(12) % classes
    result, found, *_ = evaluate(model, [(x_TBI, target_B, torch.arange(12))], CrossEntropy())
    probability_BK = model(x_TBI).detach().mean(0).softmax(-1)
    ranked_BK = probability_BK.argsort(-1, descending=True)[:, :5]
    assert np.array_equal(found.top, ranked_BK)
    np.testing.assert_allclose(found.probability, probability_BK.gather(1, ranked_BK), rtol=1e-5)
    assert (result.top5 is not None) == measured
    assert list(result.metrics) == ["top1", *["top5"] * measured, "loss", "firing_rate"]


def evaluated(x_TBI: Tensor, *, counts: bool = True) -> EvaluationOutput:
    index_B = torch.arange(x_TBI.shape[1])
    parts = (x_TBI.split(16, dim=1), (index_B % K).split(16), index_B.split(16))
    batches = zip(*parts, strict=True)
    return evaluate(network(), batches, CrossEntropy(), counts_operations=counts)


def test_operations_are_of_samples_from_all_over_the_set() -> None:
    inference = evaluated(sorted_set()).inference
    assert inference is not None and inference.samples == MAX_COUNTED_SAMPLES < B // 2
    loud = (
        inference.macs * MAX_COUNTED_SAMPLES / (T * I * 6)
    )  # of a product with silence nothing is made
    assert loud == int(loud) and MAX_COUNTED_SAMPLES / 3 < loud < MAX_COUNTED_SAMPLES * 2 / 3


def test_of_a_set_that_is_no_larger_each_sample_is_counted() -> None:
    model, few = network().eval(), sorted_set()[:, B // 2 - 12 : B // 2 + 12]
    with torch.no_grad(), Operations(model) as counted, fresh_state(model):
        model(few)
    whole = counted.work["forward"]
    inference = evaluated(few).inference
    assert inference is not None and inference.samples == 24
    assert inference.macs * 24 == whole.multiplications == T * 12 * I * 6
    assert inference.work.additions == whole.additions > whole.multiplications


def test_counting_adds_nothing_to_what_is_evaluated() -> None:
    plain, counted = (evaluated(sorted_set(), counts=counts) for counts in (False, True))
    assert plain.inference is None and counted.inference is not None
    assert (plain.result, plain.activity) == (counted.result, counted.activity)


def columns(found: Predictions) -> dict[str, list[int] | None]:
    assert (found.probability[:, :-1] >= found.probability[:, 1:]).all()
    parts = {name: getattr(found, name) for name in ("index", "target", "answer", "task")}
    return {name: None if part is None else part.tolist() for name, part in parts.items()}


def asked(network: nn.Module, data: Data, steps: int) -> dict[str, list[int]]:
    """What a network answers about the evaluation set, one sample at a time."""
    rows = []
    with (
        closing(data.val(rank=0, world=1, micro_batch=1, threads=1)) as loader,
        loader.epoch(0) as batches,
        torch.no_grad(),
    ):
        for batch in batches:
            with fresh_state(network):
                logits_TBK = network(to_time_first(batch.x, steps))
            rows.append((int(batch.index), int(batch.target), int(logits_TBK.sum(0).argmax())))
    index, target, answer = map(list, zip(*sorted(rows), strict=True))
    return {"index": index, "target": target, "answer": answer}


# ----------------------------------------------------------------------------------------- the file


def share(*rows: tuple[int, int, int]) -> Predictions:
    index, target, answer = np.array(rows, np.int64).reshape(-1, 3).T
    return Predictions(
        index=index,
        target=target,
        top=answer[:, None],
        probability=np.ones((len(index), 1), np.float32),
    )


SHARES = [[share((4, 1, 1), (0, 2, 0))], [share()], [share((3, 0, 0))]]
OF_TASKS = [[share((5, 1, 1)), share((2, 0, 1))], [share((1, 1, 0), (0, 0, 0)), share()]]


@pytest.mark.parametrize(
    ("shares", "index", "target", "answer", "task"),
    [
        (SHARES, [0, 3, 4], [2, 0, 1], [0, 0, 1], None),
        # each task is sorted for itself
        (OF_TASKS, [0, 1, 5, 2], [0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 1]),
    ],
)
def test_shares_of_any_size_are_joined_in_the_order_of_samples(
    tmp_path: Path,
    shares: list[list[Predictions]],
    index: list[int],
    target: list[int],
    answer: list[int],
    task: list[int] | None,
) -> None:
    write_predictions(tmp_path / "answers.npz", shares, has_task_column=task is not None)
    found = read_predictions(tmp_path / "answers.npz")
    assert columns(found) == {"index": index, "target": target, "answer": answer, "task": task}
    assert found.is_correct.tolist() == [a == t for a, t in zip(answer, target, strict=True)]
    assert [file.name for file in tmp_path.iterdir()] == ["answers.npz"]


def test_what_is_no_file_of_answers_is_refused_in_one_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    (tmp_path / "text.npz").write_text("answers")
    write_predictions(tmp_path / "torn.npz", [[share((0, 1, 1))]], has_task_column=False)
    os.truncate(tmp_path / "torn.npz", (tmp_path / "torn.npz").stat().st_size - 40)
    for name in ("nothing", "other", "text", "torn"):
        wanted = "must be the file that a run writes at its end, with .*; it could not be read: "
        with pytest.raises(ValueError, match=rf"^answers: .*{name}\.npz {wanted}"):
            read_predictions(tmp_path / f"{name}.npz")
    for top in ([[1.0], [1.0]], [[True], [False]], [[1]], [1, 1], [[1, 0], [0, 1]]):
        shown = {"index": [0, 1], "target": [1, 0], "top": top}
        np.savez(tmp_path / "answers.npz", **shown, probability=[[0.9], [0.8]])
        with pytest.raises(ValueError, match=r"answers\.npz must hold whole numbers"):
            read_predictions(tmp_path / "answers.npz")


# ------------------------------------------------------------------------------------------ of runs


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_run_writes_what_its_network_answers(tmp_path: Path, ema_decay: float) -> None:
    recipe = small_recipe(epochs=6, ema_decay=ema_decay)
    summary = finished(tmp_path / "run", recipe)
    found, network = (
        read_predictions(tmp_path / "run" / "answers.npz"),
        pipeline.load(tmp_path / "run"),
    )
    assert not network.training
    assert columns(found) == {**asked(network, recipe.data.build(), 3), "task": None}
    assert found.index.tolist() == list(range(20))
    assert summary["top1"] == found.is_correct.mean() and 0 < summary["top1"] < 1


class Undecided(nn.Module):
    """Says the same of every class, or of the ten that it likes best of many."""

    def forward(self, x_TB: Tensor) -> Tensor:
        return (torch.arange(x_TB.shape[-1]) % 2).expand(*x_TB.shape[:2], -1).float()


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_classes_that_tie_are_answered_as_they_are_counted(classes: int) -> None:
    # each class another number of times
    target_B = torch.arange(classes).repeat_interleave(torch.arange(classes) + 1)
    batches = [(torch.zeros(1, len(target_B), classes), target_B, torch.arange(len(target_B)))]
    result, answers, *_ = evaluate(Undecided(), batches, CrossEntropy())
    assert result.top1 == answers.is_correct.mean() > 0
    assert (answers.answer % 2 == 1).all()


def test_an_evaluation_of_the_first_samples_writes_those(tmp_path: Path) -> None:
    train_inline(tmp_path / "run", small_recipe(evaluation=Evaluation(samples=7)))
    assert columns(read_predictions(tmp_path / "run" / "answers.npz"))["index"] == list(range(7))


def test_a_run_that_died_before_its_end_evaluates_again_and_writes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = finished(tmp_path / "whole", small_recipe())
    with dies(continual.before("_finish", 16)):
        train_inline(tmp_path / "broken", small_recipe())
    assert not (tmp_path / "broken" / "answers.npz").exists()
    evaluated: list[int] = []
    evaluate = Trainer._evaluate
    monkeypatch.setattr(
        Trainer, "_evaluate", lambda self: evaluated.append(self.step) or evaluate(self)
    )
    resumed = finished(tmp_path / "broken", small_recipe())
    assert evaluated == [16]
    assert [resumed[key] for key in ("top1", "loss")] == [summary[key] for key in ("top1", "loss")]
    whole, broken = (
        columns(read_predictions(tmp_path / name / "answers.npz")) for name in ("whole", "broken")
    )
    assert whole == broken


def test_of_several_tasks_index_counts_in_the_set_of_each(tmp_path: Path) -> None:
    recipe = continual.split()
    summary = continual.train(tmp_path / "run", recipe)
    found = read_predictions(tmp_path / "run" / "answers.npz")
    assert found.task is not None and found.task.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    network = pipeline.load(tmp_path / "run", trust=["tests"])
    for number, task in enumerate(tasks_of(recipe)):
        task.choose_head(network)
        here = found.task == number
        mine = {name: getattr(found, name)[here].tolist() for name in ("index", "target", "answer")}
        assert mine == asked(network, task.data, 3)
        assert summary["accuracy_matrix"][-1][number] == found.is_correct[here].mean()
    # classes 2 and 3 of six, in the file's count
    assert found.index[10:14].tolist() == [2, 3, 8, 9]


# ------------------------------------------------------------------------------------ two processes


def _rank(rank: int, ranks: int, job: Job) -> None:
    """Between two readings of an evaluation the card of the first rank uses 5 J, the other 10."""
    used_j = itertools.count(1000 * rank, 5 * (rank + 1))
    card = Mock(card=f"GPU-{rank}", read=lambda: float(next(used_j)))
    evaluation.EnergyCounter = lambda device: card  # type: ignore[misc, assignment]
    run(job, RankInfo(rank, ranks, "cpu", rank))


@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.parametrize("samples", [None, 1])
def test_two_processes_write_what_one_does(tmp_path: Path, samples: int | None) -> None:
    """With one sample to evaluate on the second rank has none."""
    # 21 samples: one rank has 11 of them, the other 10.
    data = spec(Synthetic, samples=64, val_samples=21, shape=(1, 8, 8))
    recipe = small_recipe(data=data, epochs=1, evaluation=Evaluation(samples=samples))
    run_ranks(_rank, 2, tmp_path, make_run(tmp_path / "two", recipe))
    train_inline(tmp_path / "one", recipe)
    runs = [tmp_path / "one", tmp_path / "two"]
    alone, both = (read_json(run / "summary.json")["inference"] for run in runs)
    # A card that evaluated nothing does not count.
    assert both["measured_j"] == pytest.approx(15 / 21 if samples is None else 5)
    assert "measured_j" not in alone and both["energy_j"] > 0
    one, two = (columns(read_predictions(run / "answers.npz")) for run in runs)
    assert one == two and two["index"] == list(range(samples or 21))
