import copy
from typing import Self

import pytest
import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from timm.layers.evo_norm import EvoNorm2dB0
from torch import distributed, nn

from pipeline.spiking.encode import repeat
from pipeline.spiking.norm import BatchNorm, foreign_norms
from tests.helpers.processes import run_ranks
from tests.helpers.rule_networks import refusals

SHAPES = [(4, 5, 3), (4, 5, 3, 2, 2)]


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def fresh(**choices: str) -> BatchNorm:
    norm = BatchNorm(3, **choices).double()
    norm.weight.data.copy_(torch.tensor([0.5, 2.0, -1.0]))
    norm.bias.data.copy_(torch.tensor([0.1, -0.3, 1.0]))
    return norm


@pytest.mark.parametrize("shape", SHAPES)
def test_folded_equals_slices(shape):
    x, upstream = double(*shape).requires_grad_(), double(*shape)
    one, many = fresh(), fresh()
    folded, sliced = one(x), torch.cat([many(part) for part in x.split([1, 2, 1])])
    gradients = [torch.autograd.grad((y * upstream).sum(), x)[0] for y in (folded, sliced)]
    assert torch.equal(folded, sliced) and torch.equal(*gradients)
    assert all(map(torch.equal, one.state_dict().values(), many.state_dict().values()))
    sliced = torch.cat([many.eval()(x_1B) for x_1B in x.split(1)])
    assert torch.allclose(one.eval()(x), sliced, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_per_step_is_torchs_batch_norm_called_at_each_step(shape):
    ours, theirs = fresh(), (nn.BatchNorm2d(3) if len(shape) == 5 else nn.BatchNorm1d(3)).double()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    x = double(*shape)
    for mode in (True, False):
        expected = torch.stack([theirs.train(mode)(x_t) for x_t in x])
        assert torch.allclose(ours.train(mode)(x), expected, atol=1e-13)
        assert torch.allclose(ours.running_var, theirs.running_var)


def test_over_time_takes_one_statistic():
    x = double(4, 5, 3) + torch.arange(4).reshape(4, 1, 1)
    norm = BatchNorm(3, over="time").double()
    y = norm(x)
    assert torch.allclose(y.mean((0, 1)), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(norm.running_mean, 0.1 * x.mean((0, 1)))
    assert not torch.allclose(y, BatchNorm(3).double()(x), atol=0.1)


@pytest.mark.parametrize("choice", [{}, {"over": "time"}, {"between": "world"}])
def test_frozen_is_eval_mode_in_training(choice):
    norm, x = fresh(**choice), double(4, 5, 3)
    with torch.no_grad():  # statistics move without a graph, too
        norm(x + 2)
    before = copy.deepcopy(norm.state_dict())
    norm.frozen = True
    y = norm(x)
    assert torch.equal(y, norm.eval()(x)) and norm.running_mean.min() > 0.1
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    norm.train().frozen = False
    assert not torch.allclose(norm(x), y, atol=0.1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("over", ["step", "time"])
@pytest.mark.parametrize("mode", ["train", "frozen", "eval"])
def test_a_still_image_moves_the_statistics_as_its_steps_do(shape, over, mode):
    x_B, upstream = double(*shape[1:]) + 2, double(*shape)
    found = []
    for frames in (lambda x_B: repeat(x_B, 4), lambda x_B: repeat(x_B, 4).contiguous()):
        norm, leaf_B = fresh(over=over), x_B.clone().requires_grad_()
        norm.train(mode != "eval").frozen = mode == "frozen"
        y = norm(frames(leaf_B))
        gradients = torch.autograd.grad((y * upstream).sum(), [leaf_B, norm.weight, norm.bias])
        found.append([y, *gradients, norm.running_mean, norm.running_var])
    assert all(
        torch.allclose(one, other, rtol=0, atol=1e-12) for one, other in zip(*found, strict=True)
    )
    assert (found[0][-2].abs().max() > 0.1) == (mode == "train")


def test_between_world_is_per_rank_where_there_is_one_rank():
    x = double(4, 5, 3)
    assert torch.equal(fresh(between="world")(x), fresh()(x))


test_refuses = refusals(
    [
        (
            lambda: BatchNorm(3, over="batch"),
            r"BatchNorm: over must be 'step' or 'time'; got over='batch'",
        ),
        (
            lambda: BatchNorm(3, between="all"),
            r"BatchNorm: between must be 'rank' or 'world'; got between='all'",
        ),
        (
            lambda: BatchNorm(3)(torch.zeros(2, 2, 4)),
            r"BatchNorm: the input must be \[T, B, 3, \.\.\.\]; got shape \(2, 2, 4\)",
        ),
    ]
)


def rank_of_two(
    rank: int, ranks: int, x: torch.Tensor, upstream: torch.Tensor, expected: dict
) -> None:
    mine = slice(0, 4) if rank == 0 else slice(4, 7)  # unequal on purpose
    for over, one_rank in expected.items():
        got = norm_and_gradients(over, x[:, mine], upstream[:, mine])
        for name in ("weight", "bias"):
            distributed.all_reduce(
                got[name]
            )  # gradients of parameters are sums over samples, and so over ranks
        for name, value in one_rank.items():
            value = value[:, mine] if name in ("y", "x") else value
            torch.testing.assert_close(
                got[name], value, atol=1e-12, rtol=0, msg=lambda m, n=name, o=over: f"{o} {n}: {m}"
            )


def norm_and_gradients(
    over: str, x: torch.Tensor, upstream: torch.Tensor
) -> dict[str, torch.Tensor]:
    norm = fresh(over=over, between="world")
    x = x.clone().requires_grad_()
    y = norm(x)
    g_x, g_weight, g_bias = torch.autograd.grad((y * upstream).sum(), [x, norm.weight, norm.bias])
    results = {"y": y.detach(), "x": g_x, "weight": g_weight, "bias": g_bias}
    return results | {"running_mean": norm.running_mean, "running_var": norm.running_var}


@pytest.mark.distributed
def test_two_unequal_ranks_equal_one(tmp_path):
    x, upstream = double(2, 7, 3, 2, 2) + 5, double(2, 7, 3, 2, 2)
    expected = {over: norm_and_gradients(over, x, upstream) for over in ("step", "time")}
    run_ranks(rank_of_two, 2, tmp_path, x, upstream, expected)


class Frozen(nn.BatchNorm2d):
    """A norm that is kept in evaluation mode in the usual way."""

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


@pytest.mark.parametrize(
    ("norm", "is_foreign"),
    [
        (nn.BatchNorm1d(3), True),
        (nn.BatchNorm2d(3), True),
        (nn.BatchNorm3d(3), True),
        (nn.BatchNorm2d(3, affine=False), True),
        (nn.BatchNorm2d(3, track_running_stats=False).eval(), True),
        (nn.SyncBatchNorm(3), True),
        (nn.LazyBatchNorm2d(), True),
        (nn.InstanceNorm2d(3, track_running_stats=True), True),
        (BatchNormAct2d(3), True),
        (EvoNorm2dB0(3), True),
        (nn.BatchNorm2d(3).eval(), True),  # until training begins
        (nn.InstanceNorm2d(3, affine=True), False),
        (nn.GroupNorm(1, 3), False),
        (nn.LayerNorm(3), False),
        (FrozenBatchNormAct2d(3), False),
        (Frozen(3), False),
        (BatchNorm(3), False),
        (BatchNorm(3, over="time"), False),
        (nn.Conv2d(3, 3, 1), False),
    ],
    ids=repr,
)
def test_which_norms_mix_time_steps(norm, is_foreign):
    model = nn.Sequential(nn.Identity(), norm)
    modes = [module.training for module in model.modules()]
    assert foreign_norms(model) == ({"1": norm} if is_foreign else {})
    assert [module.training for module in model.modules()] == modes
    assert foreign_norms(norm) == ({"the model itself": norm} if is_foreign else {})


def test_a_norm_that_train_leaves_in_evaluation_mixes_nothing():
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[0].eval()
            return self

    assert foreign_norms(Frozen(nn.BatchNorm2d(3))) == {}
    assert list(foreign_norms(Frozen(nn.BatchNorm2d(3, track_running_stats=False)))) == [
        "0"
    ]  # it has no statistics but these
