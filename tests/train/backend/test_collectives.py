"""What workers say to one another, in two real processes."""

import os
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed, nn

from pipeline.core.errors import Diverged
from pipeline.measure.activity import LayerActivity
from pipeline.spiking.neuron import LIF
from pipeline.spiking.state import fresh_state
from pipeline.spiking.synapse import Linear
from pipeline.train.backend.collectives import Ranks, group_of_one
from pipeline.train.evaluation import (
    Evaluation,
    Predictions,
    evaluate,
    read_predictions,
    write_predictions,
)
from pipeline.train.objective import CrossEntropy
from tests.helpers.processes import refusal, run_ranks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda", "cpu:gloo,cuda:nccl")])
def test_one_worker_alone_reduces_where_it_computes(
    device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray's workers do: over gloo alone a card's tensors would go through the host."""
    asked: list[str] = []
    monkeypatch.setattr(
        distributed, "init_process_group", lambda backend, **about: asked.append(backend)
    )
    with group_of_one(device):
        assert os.environ["DS_ACCELERATOR"] == device
    assert asked == [backend]


def _talk(rank: int, size: int) -> dict[str, Any]:
    ranks = Ranks(rank, size)
    network = nn.BatchNorm1d(2)
    network.running_mean.fill_(float(rank))  # type: ignore[union-attr]
    with ranks.averaged_buffers(network) as own:
        inside = network.running_mean.tolist()  # type: ignore[union-attr]

    def refuse(only: int, error: Exception) -> None:
        if rank == only:
            raise error

    return {
        "refused": refusal(lambda: ranks.broadcast_object(lambda: refuse(0, ValueError("seen")))),
        "together": refusal(lambda: ranks.all_or_raise(lambda: refuse(1, Diverged("cannot")))),
        "sum": ranks.sum(torch.tensor([1.0, float(rank)])).tolist(),
        "mean": ranks.mean(torch.tensor([float(rank)])).tolist(),
        "max": ranks.max(torch.tensor([rank, 5 - rank])).tolist(),
        "decide": ranks.decide(rank == 0, rank == 1),
        "agree": ranks.broadcast_object(lambda: f"rank {rank}"),
        "all": ranks.all_gather_object([rank] * rank),
        "averaged": inside,
        "own": [
            own["running_mean"].tolist() == [float(rank)] * 2,
            network.running_mean.tolist() == [float(rank)] * 2,  # type: ignore[union-attr]
        ],
        "counted": int(network.num_batches_tracked),  # type: ignore[arg-type]
    }


def test_both_ranks_hear_the_same(tmp_path: Path) -> None:
    expected = {
        "sum": [2.0, 1.0],
        "mean": [0.5],
        "max": [1, 5],
        "decide": [True, False],
        "agree": "rank 0",
        "all": [[], [1]],
        "refused": "UserError: seen",
        "averaged": [0.5, 0.5],
        "own": [True, True],
        "together": "Diverged: cannot (worker 1)",
        "counted": 0,
    }
    assert run_ranks(_talk, 2, tmp_path) == [expected] * 2


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Linear(4, 6), LIF(), Linear(6, 7))


def _batches(samples: range, size: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    x_TBC, target_B = torch.randn(3, 25, 4, generator=draw), torch.randint(7, (25,), generator=draw)
    index = [torch.tensor(samples[i : i + size]) for i in range(0, len(samples), size)]
    return [(x_TBC[:, index_B], target_B[index_B], 100 + index_B) for index_B in index]


def _evaluate(
    rank: int, size: int
) -> tuple[Evaluation, list[Predictions], tuple[LayerActivity, ...]]:
    share = (
        range(25) if size == 1 else (range(18, 25), range(18, 18), range(18))[rank]
    )  # one rank has nothing
    ranks = Ranks(rank, size)
    result, answers, activity, inference, _ = evaluate(
        _network(), _batches(share, 4), CrossEntropy(), ranks=ranks, counts_operations=True
    )
    assert (inference is None) == (not share)
    return result, ranks.all_gather_object(answers), activity


def test_evaluation_is_exact_over_unequal_ranks(tmp_path: Path) -> None:
    one, answers, activity = _evaluate(0, 1)
    network = _network()
    [(x_TBC, target_B, index_B)] = _batches(range(25), 25)
    with torch.no_grad(), fresh_state(network):  # independently: all samples at once
        ranked_BK = network(x_TBC).mean(0).argsort(-1, descending=True)
    hits_BK = ranked_BK == target_B[:, None]
    assert (one.samples, one.top1, one.top5) == (
        25,
        pytest.approx(float(hits_BK[:, 0].double().mean())),
        pytest.approx(float(hits_BK[:, :5].any(-1).double().mean())),
    )
    expected = torch.stack([index_B, target_B, ranked_BK[:, 0]])
    assert np.array_equal(_written(tmp_path, answers), expected)
    threes = run_ranks(_evaluate, 3, tmp_path)
    assert [each.name for each in activity] == ["1"] and 0 < activity[0].rate == one.firing_rate
    for three, shares, its_activity in threes:
        assert its_activity == activity
        assert three == replace(one, loss=pytest.approx(one.loss, abs=1e-6))
        assert [len(each.index) for each in shares] == [7, 0, 18]
        assert np.array_equal(_written(tmp_path, shares), _written(tmp_path, answers))


def _written(folder: Path, shares: list[Predictions]) -> np.ndarray:
    write_predictions(folder / "answers.npz", [[share] for share in shares], has_task_column=False)
    found = read_predictions(folder / "answers.npz")
    return np.stack([found.index, found.target, found.answer])


def _wait(rank: int, size: int) -> str:
    distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1), distributed.group.WORLD)

    def read_all_pages() -> str:
        time.sleep(3)
        return "read"

    return Ranks(rank, size).broadcast_object(read_all_pages)


def test_what_one_rank_does_alone_may_take_longer_than_gradients_may(tmp_path: Path) -> None:
    assert run_ranks(_wait, 2, tmp_path) == ["read", "read"]
