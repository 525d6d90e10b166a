"""Whether ranks hold the same bits, and which of them takes long."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from pipeline.backend.averaged import Averaged
from pipeline.backend.plain import Plain
from pipeline.guards.batches import GoBack
from pipeline.guards.replicas import drifted, fingerprint, stragglers
from pipeline.ranks import Ranks
from pipeline.refused import Diverged, Refused
from pipeline.run import saving
from pipeline.run.saving import Saving
from tests.checkpoint.few import Counting
from tests.processes import run_ranks
from tests.small import small_recipe, train_inline


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_bit_and_every_place_counts(dtype: torch.dtype) -> None:
    model = network(dtype)
    before = fingerprint(model.parameters())
    assert fingerprint(network(dtype).parameters()) == before
    weight = model[0].weight.data  # type: ignore[union-attr, operator]
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    bits = 8 * weight.element_size()
    for row, column, bit in product((0, 3), (2, 3), range(bits)):
        flip = 1 << bit if bit < bits - 1 else -1 << bit
        weight.view(kind)[row, column] ^= flip
        assert fingerprint(model.parameters()) != before, (row, column, bit)
        weight.view(kind)[row, column] ^= flip
    weight[[0, 1]] = weight[[1, 0]]
    assert fingerprint(model.parameters()) != before


def _compared(rank: int, size: int) -> dict[str, Any]:
    ranks, model = Ranks(rank, size), network()
    same = drifted(model.parameters(), ranks)
    if rank == 1:
        model[1].bias.data[0] += 1e-6  # type: ignore[union-attr, operator]
    busy = [1.0, 1.9, 1.1][rank]
    return {
        "same": same,
        "apart": drifted(model.parameters(), ranks),
        "slow": stragglers(busy, ranks),
        "none": stragglers(1.0, ranks),
    }


def test_the_one_that_is_apart_and_the_one_that_is_slow_are_named_on_every_rank(tmp_path: Path) -> None:
    found = run_ranks(_compared, 3, tmp_path)
    assert found == [{"same": [], "apart": [1], "slow": {1: pytest.approx(1.9 / 1.1)}, "none": {}}] * 3


def test_of_two_the_slower_one(tmp_path: Path) -> None:
    assert stragglers(5.0, Ranks()) == {}
    assert [each["slow"] for each in run_ranks(_compared, 2, tmp_path)] == [{1: pytest.approx(1.9)}] * 2


def _damaged(rank: int, size: int) -> dict[str, str]:
    """What is said of a run one of whose workers, the last, holds something else."""
    ranks, model, rule = Ranks(rank, size), nn.Sequential(network(), nn.BatchNorm1d(3)), Counting(1.0)
    backend = Averaged(Plain(model, lambda net: torch.optim.SGD(net.parameters(), lr=0.1)), decay=0.9)
    parts: Any = SimpleNamespace(
        ranks=ranks, backend=backend, rule=rule, job=SimpleNamespace(run="."), checkpoints=None, meters=None
    )
    saving = Saving(parts, step=0, learnt=cast(Any, None), guard=cast(Any, None), figures=cast(Any, None))
    found = {}
    for name, value in {
        "nothing": torch.zeros(1),
        "its own running statistics": model.get_buffer("1.running_mean"),
        "their average": backend.average["1.running_mean"],
        "a weight": model.get_parameter("0.0.weight").detach(),
        "an average of weights": backend.average["0.0.weight"],
        "what the rule learnt": rule.get_buffer("feedback"),
    }.items():
        kept = value.clone()
        value.view(-1)[0] += rank == size - 1
        try:
            saving._compare_replicas(7)
        except GoBack as error:
            found[name] = str(error)
        value.copy_(kept)
    return found


def test_all_that_ranks_hold_alike_is_compared_and_what_is_their_own_is_not(tmp_path: Path) -> None:
    for found in run_ranks(_damaged, 3, tmp_path):
        assert [*found] == ["a weight", "an average of weights", "what the rule learnt"]
        assert all("what workers 2 have learnt is not what others have" in said for said in found.values())


def test_an_average_that_is_not_finite_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Averaged.step

    def spoilt(self: Averaged) -> None:
        made(self)
        next(iter(self.average.values())).fill_(torch.nan)

    monkeypatch.setattr(Averaged, "step", spoilt)
    with pytest.raises(Diverged, match="must be finite to be saved; they are not after step 3"):
        train_inline(tmp_path / "run", small_recipe(ema_decay=0.9))


def test_weights_that_come_apart_again_and_again_are_no_matter_of_the_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "drifted", lambda values, ranks: [1])
    said = (
        "training: batch 0: what workers 1 have learnt is not what others have; it has gone back max_rollbacks=1 times; "
        "a memory, a device or a network is at fault: look with spiketrain doctor"
    )
    with pytest.raises(Refused) as refusal:
        train_inline(tmp_path / "run", small_recipe(replicas_every=1, max_rollbacks=1))
    assert str(refusal.value) == said and not isinstance(refusal.value, Diverged)
