import pytest
import torch

from pipeline.models.residual import ALPHA, GroupMean, Repeat, StreamVariance


def test_group_mean_undoes_repeat():
    x = torch.randn(2, 3, 4, 5)
    repeated = Repeat(3)(x)
    assert repeated.shape == (2, 3, 12, 5)
    assert torch.allclose(GroupMean(3)(repeated), x)
    assert GroupMean(2)(torch.tensor([1.0, 2.0, 5.0, 8.0]).view(1, 1, 4)).flatten().tolist() == [
        3,
        5,
    ]


def test_expected_variance_of_a_stream():
    """Against streams drawn at random: branches of unit variance, weighted by ALPHA."""
    stream = StreamVariance()
    x = torch.randn(1, 1, 2, 1_000_000, dtype=torch.float64)
    stream.add()
    x = x + ALPHA * torch.randn_like(x)
    stream.repeat()
    x = Repeat(4)(x)
    x = x + 5 * ALPHA * torch.randn_like(x)  # louder than expected, so that the division is seen
    stream.own *= 25
    assert x.var().item() == pytest.approx(stream.variance, rel=0.01)
    stream.average(4)
    x = GroupMean(4)(x)
    x = x + ALPHA * torch.randn_like(x)
    assert x.var().item() == pytest.approx(stream.variance, rel=0.01)
    stream.restart()
    assert stream.variance == 1 + ALPHA**2
