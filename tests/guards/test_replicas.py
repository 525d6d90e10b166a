"""Whether ranks hold the same bits, and which of them takes long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.guards.replicas import drifted, fingerprint, stragglers
from pipeline.ranks import Ranks
from pipeline.refused import Diverged, Refused
from pipeline.run import saving
from tests.processes import run_ranks
from tests.small import small_recipe, train_inline


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_bit_and_every_place_counts(dtype: torch.dtype) -> None:
    model = network(dtype)
    before = fingerprint(model)
    assert fingerprint(network(dtype)) == before
    weight = model[0].weight.data  # type: ignore[union-attr, operator]
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    weight.view(kind)[3, 2] ^= 1
    assert fingerprint(model) != before
    weight.view(kind)[3, 2] ^= 1
    weight[[0, 1]] = weight[[1, 0]]
    assert fingerprint(model) != before


def _compared(rank: int, size: int) -> dict[str, Any]:
    ranks, model = Ranks(rank, size), network()
    same = drifted(model, ranks)
    if rank == 1:
        model[1].bias.data[0] += 1e-6  # type: ignore[union-attr, operator]
    busy = [1.0, 1.9, 1.1][rank]
    return {"same": same, "apart": drifted(model, ranks), "slow": stragglers(busy, ranks), "none": stragglers(1.0, ranks)}


def test_the_one_that_is_apart_and_the_one_that_is_slow_are_named_on_every_rank(tmp_path: Path) -> None:
    found = run_ranks(_compared, 3, tmp_path)
    assert found == [{"same": [], "apart": [1], "slow": {1: pytest.approx(1.9 / 1.1)}, "none": {}}] * 3


def test_of_two_the_slower_one(tmp_path: Path) -> None:
    assert stragglers(5.0, Ranks()) == {}
    assert [each["slow"] for each in run_ranks(_compared, 2, tmp_path)] == [{1: pytest.approx(1.9)}] * 2


def test_weights_that_come_apart_again_and_again_are_no_matter_of_the_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "drifted", lambda network, ranks: [1])
    said = (
        "training: batch 0: the weights of workers 1 are others'; it has gone back max_rollbacks=1 times; "
        "a memory, a device or a network is at fault: look with spiketrain doctor"
    )
    with pytest.raises(Refused) as refusal:
        train_inline(tmp_path / "run", small_recipe(replicas_every=1, max_rollbacks=1))
    assert str(refusal.value) == said and not isinstance(refusal.value, Diverged)
