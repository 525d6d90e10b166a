"""The three sources of a signal, on networks whose Jacobian is known."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.spiking.error_feedback import ErrorFeedback, FixedRandom, MeanJacobian
from pipeline.spiking.noise import noise

HIDDEN, OUTPUTS, BATCH, SCALE = 100, 5, 32, 0.2


class Tanh:
    """o = W2 tanh(W1 h) behind a hidden layer h = tanh(W0 x), float64."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(4)
        sizes = ((HIDDEN, 20), (HIDDEN, HIDDEN), (OUTPUTS, HIDDEN))
        self.w0, self.w1, self.w2 = (self.draw(*size) / math.sqrt(size[1]) for size in sizes)

    def draw(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, dtype=torch.float64)

    def hidden(self) -> Tensor:
        return torch.tanh(self.draw(BATCH, 20) @ self.w0.T)

    def outputs(self, h_BN: Tensor) -> Tensor:
        return torch.tanh(h_BN @ self.w1.T) @ self.w2.T

    def expected_jacobian(self) -> Tensor:
        """E[(do/dh)^T] `[N, K]` by the chain rule, over 200 batches."""
        total = torch.zeros(HIDDEN, OUTPUTS, dtype=torch.float64)
        for _ in range(200):
            slope_N = (1 - torch.tanh(self.hidden() @ self.w1.T).square()).mean(0)
            total += self.w1.T @ (slope_N[:, None] * self.w2.T)
        return total / 200


def cosine(one: Tensor, other: Tensor) -> float:
    return float(F.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0))


def moved(feedback: MeanJacobian, *pairs: tuple[Tensor, Tensor]) -> MeanJacobian:
    """After one batch of outputs and the noise in them."""
    for o_BK, z_BN in pairs:
        feedback.accumulate(0, o_BK, z_BN)
    feedback.end_of_batch(lambda statistic: statistic)
    return feedback


def learnt(network: Tanh, momentum: float, *, updates: int = 6000) -> MeanJacobian:
    found = MeanJacobian(momentum=momentum, scale=SCALE)
    for _ in range(updates):
        h_BN, z_BN = network.hidden(), network.draw(BATCH, HIDDEN)
        moved(found, (network.outputs(h_BN + SCALE * z_BN), z_BN))
    return found


def test_the_mean_jacobian_of_a_tanh_network_is_found():
    network = Tanh()
    expected = network.expected_jacobian()
    found = learnt(network, 0.999)
    assert cosine(found.jacobian(0), expected) >= 0.95
    assert (
        0.9 < float(found.jacobian(0).norm() / expected.norm()) < 1.1
    )  # less by the smoothing, more by what noise is left
    assert abs(cosine(learnt(network, 0.0, updates=1000).jacobian(0), expected)) <= 0.3
    fixed = FixedRandom()
    fixed.signal(0, HIDDEN, e_BK=torch.zeros(1, OUTPUTS), o_BK=torch.zeros(1, OUTPUTS), z_BN=None)
    assert abs(cosine(fixed.get_buffer("matrix_0"), expected)) <= 0.2


@pytest.mark.parametrize("scale", [0.01, 0.2, 3.0])
def test_a_linear_network_gives_one_estimate_at_every_scale(scale):
    """For a pair z, -z exactly, z z^T W^T; for single points in the mean."""
    network = Tanh()
    h_BN, z_BN = network.hidden(), network.draw(BATCH, HIDDEN)
    pair = [((h_BN + scale * z) @ network.w2.T, z) for z in (z_BN, -z_BN)]
    found = moved(MeanJacobian(momentum=0.0, scale=scale), *pair)
    expected = z_BN.T @ z_BN @ network.w2.T / BATCH
    assert torch.allclose(found.jacobian(0), expected, atol=1e-11)


def test_the_correction_undoes_the_start_at_zero():
    found = MeanJacobian(momentum=0.9999, scale=SCALE)
    z_BN, o_BK = (
        torch.ones(1, 4, dtype=torch.float64),
        torch.arange(3.0, dtype=torch.float64)[None] + 1,
    )
    for moves in range(1, 6001):
        found.accumulate(0, o_BK, z_BN)
        if moves == 1:
            assert not found.jacobian(0).any()
        found.end_of_batch(lambda statistic: statistic)
    estimate = z_BN.T @ o_BK / SCALE
    assert torch.allclose(found.jacobian(0), estimate, rtol=1e-10)
    assert float(found.get_buffer("matrix_0").norm() / estimate.norm()) == pytest.approx(
        1 - 0.9999**6000, rel=1e-10
    )


def test_matrices_are_moved_by_the_mean_over_micro_batches_and_ranks():
    """Two ranks of unequal share, as one with all samples."""
    network = Tanh()
    z_BN, o_BK = network.draw(6, HIDDEN), network.draw(6, OUTPUTS)
    whole, first, second = (MeanJacobian(momentum=0.5, scale=SCALE) for _ in range(3))
    moved(whole, (o_BK, z_BN))
    sent: list[Tensor] = []
    second.accumulate(0, o_BK[4:], z_BN[4:])
    second.end_of_batch(lambda statistic: (sent.append(statistic), statistic)[1])
    for rows in (slice(0, 1), slice(1, 4)):
        first.accumulate(0, o_BK[rows], z_BN[rows])
    first.end_of_batch(lambda statistic: (statistic + sent[0]) / 2)
    assert torch.allclose(*[each.get_buffer("matrix_0") for each in (first, whole)], atol=1e-14)


def test_a_fixed_matrix_has_the_scale_of_the_errors():
    fixed = FixedRandom()
    e_BK = torch.randn(64, OUTPUTS, generator=torch.Generator().manual_seed(0))
    g_BN = fixed.signal(3, 20_000, e_BK=e_BK, o_BK=e_BK, z_BN=None)
    assert float(g_BN.square().mean() / e_BK.square().mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(g_BN, fixed.signal(3, 20_000, e_BK=e_BK, o_BK=e_BK, z_BN=None))
    assert not torch.equal(g_BN, fixed.signal(4, 20_000, e_BK=e_BK, o_BK=e_BK, z_BN=None))


@pytest.mark.parametrize("build", [lambda: MeanJacobian(momentum=0.9, scale=SCALE), FixedRandom])
def test_a_checkpoint_brings_the_sizes(build):
    first, second = build(), build()

    def signal(feedback: ErrorFeedback, units: int) -> None:
        e_BK, z_BN = (
            torch.ones(2, OUTPUTS),
            noise(torch.tensor([1, 2]), units, distribution="gaussian"),
        )
        feedback.signal(0, units, e_BK=e_BK, o_BK=e_BK, z_BN=z_BN)

    signal(first, 6)
    first.end_of_batch(lambda statistic: statistic)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.get_buffer("matrix_0"), first.get_buffer("matrix_0"))
    message = (
        r"the size of a layer must not change; got 7 units and 5 outputs at layer 0, .* \(6, 5\)"
    )
    with pytest.raises(ValueError, match=message):
        signal(second, 7)
    second.reset(torch.device("cpu"))
    assert "matrix_0" not in second.state_dict()
