"""Whether ranks hold the same bits, and which of them takes long."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.core.errors import Diverged, UserError
from pipeline.recipe import Policy
from pipeline.train import checkpointing
from pipeline.train.backend import collectives
from pipeline.train.backend.collectives import _ROW as ROW
from pipeline.train.backend.collectives import Ranks, drifted, fingerprint, stragglers
from pipeline.train.backend.ema import EMABackend
from pipeline.train.backend.plain import Plain
from pipeline.train.checkpointing import SavingHooks
from pipeline.train.recovery import Rollback
from tests.helpers.few import Counting
from tests.helpers.processes import run_ranks
from tests.helpers.small import small_recipe, train_inline


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


KINDS = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.bool,
    torch.uint8,
    torch.int64,
]
BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SIZES = st.integers(1, 3 * ROW + 2) | st.sampled_from(
    [1, ROW - 1, ROW, ROW + 1, 2 * ROW, 2 * ROW + 1]
)


def drawn(kind: torch.dtype, size: int, seed: int) -> Tensor:
    """Of any bits; all of a bool are one."""
    if kind == torch.bool:
        return torch.randint(2, (size,), generator=torch.Generator().manual_seed(seed)).to(kind)
    made = torch.randint(
        256, (size * kind.itemsize,), generator=torch.Generator().manual_seed(seed)
    )
    return made.to(torch.uint8).view(kind)


@settings(deadline=None, max_examples=300)
@given(
    st.data(),
    st.sampled_from(KINDS),
    st.lists(SIZES, min_size=1, max_size=3),
    st.integers(0, 1 << 30),
)
def test_any_bit_that_flips_is_seen(
    data: st.DataObject, kind: torch.dtype, sizes: list[int], seed: int
) -> None:
    values = [drawn(kind, size, seed + index) for index, size in enumerate(sizes)]
    before = fingerprint(values)
    assert fingerprint([value.clone() for value in values]) == before
    value = data.draw(st.sampled_from(values))
    place = data.draw(st.integers(0, len(value) - 1))
    bits = 1 if kind == torch.bool else 8 * kind.itemsize
    bit = data.draw(st.integers(0, bits - 1))
    value.view(BYTES[kind.itemsize])[place] ^= (
        -1 << bit if bit == 8 * kind.itemsize - 1 and kind.itemsize > 1 else 1 << bit
    )
    assert fingerprint(values) != before


@settings(deadline=None, max_examples=300)
@given(
    st.data(),
    st.sampled_from(KINDS),
    st.lists(SIZES, min_size=1, max_size=3),
    st.integers(0, 1 << 30),
)
def test_any_two_that_change_places_are_seen(
    data: st.DataObject, kind: torch.dtype, sizes: list[int], seed: int
) -> None:
    """Also where they stand below one another, and where they differ in their highest bit alone."""
    values = [
        drawn(kind, size, seed + index).view(BYTES[kind.itemsize])
        for index, size in enumerate(sizes)
    ]
    one, other = data.draw(st.sampled_from(values)), data.draw(st.sampled_from(values))
    here = data.draw(st.integers(0, len(one) - 1))
    below = st.integers(0, (len(other) - 1 - here % ROW) // ROW).map(
        lambda row: here % ROW + row * ROW
    )
    there = data.draw(
        st.integers(0, len(other) - 1) | (below if len(other) > here % ROW else st.nothing())
    )
    if kind != torch.bool and data.draw(st.booleans()) and (one is not other or here != there):
        highest = 128 if kind == torch.uint8 else -1 << 8 * kind.itemsize - 1
        other[there] = one[here]
        other[there] ^= highest
    before, (a, b) = (
        fingerprint([value.view(kind) for value in values]),
        (one[here].clone(), other[there].clone()),
    )
    one[here], other[there] = b, a
    assert (fingerprint([value.view(kind) for value in values]) == before) == bool(a == b)


def test_nothing_numbers_without_a_place_and_views_have_a_fingerprint() -> None:
    flat = torch.arange(24, dtype=torch.bfloat16)
    parts = [torch.zeros(0), torch.tensor(1.0), flat[1:], flat[2:].view(2, 11).t()]
    assert fingerprint(parts) == fingerprint([part.clone() for part in parts])
    assert fingerprint([]) == fingerprint(iter([])) != fingerprint(parts)


def test_one_alone_compares_with_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "fingerprint", None)
    assert drifted(network().parameters(), Ranks()) == []


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


@pytest.mark.distributed
def test_the_one_that_is_apart_and_the_one_that_is_slow_are_named_on_every_rank(
    tmp_path: Path,
) -> None:
    found = run_ranks(_compared, 3, tmp_path)
    assert (
        found == [{"same": [], "apart": [1], "slow": {1: pytest.approx(1.9 / 1.1)}, "none": {}}] * 3
    )
    assert stragglers(5.0, Ranks()) == {}
    (two := tmp_path / "two").mkdir()  # of two the slower one
    assert [each["slow"] for each in run_ranks(_compared, 2, two)] == [{1: pytest.approx(1.9)}] * 2


def _damaged(rank: int, size: int) -> dict[str, str]:
    """What is said of a run one of whose workers, the last, holds something else."""
    ranks, model, rule = (
        Ranks(rank, size),
        nn.Sequential(network(), nn.BatchNorm1d(3)),
        Counting(1.0),
    )
    backend = EMABackend(
        Plain(model, lambda net: torch.optim.SGD(net.parameters(), lr=0.1)), decay=0.9
    )
    parts: Any = SimpleNamespace(
        ranks=ranks,
        backend=backend,
        rule=rule,
        job=SimpleNamespace(run="."),
        checkpoints=None,
    )
    checkpointing = SavingHooks(parts, step=0, state=dict)
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
            checkpointing._compare_replicas(7)
        except Rollback as error:
            found[name] = str(error)
        value.copy_(kept)
    return found


@pytest.mark.distributed
def test_all_that_ranks_hold_alike_is_compared_and_what_is_their_own_is_not(tmp_path: Path) -> None:
    for found in run_ranks(_damaged, 3, tmp_path):
        assert [*found] == ["a weight", "an average of weights", "what the rule learnt"]
        assert all(
            "weights or rule buffers of workers 2 differ from those of others" in said
            for said in found.values()
        )


@settings(deadline=None, max_examples=200)
@given(
    st.data(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(1, 3000),
    st.sampled_from([torch.nan, torch.inf, -torch.inf]),
)
def test_one_number_that_is_not_finite_is_found_wherever_it_is(
    data: st.DataObject, kind: torch.dtype, size: int, bad: float
) -> None:
    largest = torch.finfo(kind).max  # whose sum would not be finite
    values = [
        torch.full((size,), largest, dtype=kind),
        torch.zeros(0),
        torch.tensor(3),
        torch.full((5, 7), -1.0),
    ]
    saving: Any = Mock(_replicated=lambda: values)
    SavingHooks._check_finite(saving, 1)
    values[0][data.draw(st.integers(0, size - 1))] = bad
    with pytest.raises(Diverged):
        SavingHooks._check_finite(saving, 1)


def test_an_average_that_is_not_finite_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = EMABackend.step

    def spoilt(self: EMABackend, bad: Any) -> None:
        made(self, bad)
        next(iter(self.average.values())).fill_(torch.nan)

    monkeypatch.setattr(EMABackend, "step", spoilt)
    with pytest.raises(Diverged, match="must be finite in a checkpoint; they are not after step 3"):
        train_inline(tmp_path / "run", small_recipe(ema_decay=0.9))


def test_weights_that_come_apart_again_and_again_are_no_matter_of_the_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointing, "drifted", lambda values, ranks: [1])
    said = (
        "training: batch 0 (epoch 1): weights or rule buffers of workers 1 differ from those of"
        " others; all rollbacks of max_rollbacks=1 are used; "
        "memory, a device or a network is faulty: check with spiketrain doctor"
    )
    with pytest.raises(UserError) as refusal:
        train_inline(
            tmp_path / "run", small_recipe(policy=Policy(replicas_every=1, max_rollbacks=1))
        )
    assert str(refusal.value) == said and not isinstance(refusal.value, Diverged)
